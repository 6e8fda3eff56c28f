"""The embedded default model: a small Stable Diffusion that draws one or two coloured figures."""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_folder", "style_lora"]

GUIDANCE = 3.0
"""The guidance scale at which the demo model draws best."""

_HERE = Path(__file__).parent


def model_folder() -> Path:
    """Tell where the demo model lies: a folder in diffusers' layout, float16 safetensors."""
    return _HERE / "model"


def style_lora() -> Path:
    """Tell where the demo model's style LoRA lies: a striped background, diffusers' format."""
    return _HERE / "stripes.safetensors"

"""LoRA without torch modules: files are read, checked against a graph, and fused into a clone."""

from __future__ import annotations

from holdfast.engine.lora.changes import Change, LoraLayer
from holdfast.engine.lora.files import LoraFile, read_lora
from holdfast.engine.lora.fusion import Strength, Target, check, fuse, targets
from holdfast.engine.lora.library import LoraLibrary, LoraUse

__all__ = [
    "Change",
    "LoraFile",
    "LoraLayer",
    "LoraLibrary",
    "LoraUse",
    "Strength",
    "Target",
    "check",
    "fuse",
    "read_lora",
    "targets",
]

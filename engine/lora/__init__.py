"""LoRA without torch modules: files are read, checked against a graph, and fused into a clone."""

from __future__ import annotations

from holdfast.engine.lora.files import LoraFile, LoraLayer, read_lora
from holdfast.engine.lora.fusion import Target, check, fuse, targets
from holdfast.engine.lora.shelf import LoraShelf

__all__ = ["LoraFile", "LoraLayer", "LoraShelf", "Target", "check", "fuse", "read_lora", "targets"]

"""
Diffusion images on OpenVINO, in two passes where wanted, with a lifecycle that keeps its place.

Importing this loads none of torch, diffusers, transformers, optimum or openvino.
"""

from __future__ import annotations

from holdfast.engine.config import EngineConfig
from holdfast.engine.engine import Engine, Snapshot
from holdfast.engine.errors import (
    Cancelled,
    CompileError,
    EngineClosed,
    GenerationError,
    HoldfastError,
    IllegalTransition,
    InvalidRequest,
    LoraError,
    ModelSourceError,
    QueueFull,
)
from holdfast.engine.jobs import Job
from holdfast.engine.plan import Plan
from holdfast.engine.progress import Progress
from holdfast.engine.requests import Hires, Img2Img, Lora, Request, Txt2Img, request_from_json
from holdfast.engine.result import Degradation, Result
from holdfast.states import Mode, State

__all__ = [
    "Cancelled",
    "CompileError",
    "Degradation",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "GenerationError",
    "Hires",
    "HoldfastError",
    "IllegalTransition",
    "Img2Img",
    "InvalidRequest",
    "Job",
    "Lora",
    "LoraError",
    "Mode",
    "ModelSourceError",
    "Plan",
    "Progress",
    "QueueFull",
    "Request",
    "Result",
    "Snapshot",
    "State",
    "Txt2Img",
    "request_from_json",
]

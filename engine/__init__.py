"""
Diffusion images on OpenVINO: txt2img, img2img and hires fix, with an explicit lifecycle.

A host needs this module alone: every public name is here, and is loaded when it is first used.
Importing it loads none of torch, diffusers, transformers, optimum or openvino.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.engine.imports import lazily

if TYPE_CHECKING:
    from holdfast.engine.compiling.plan import Plan
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
    from holdfast.engine.jobs.job import Job
    from holdfast.engine.jobs.progress import Progress
    from holdfast.engine.models.facts import ModelFacts
    from holdfast.engine.requests.cadence import Evaluations
    from holdfast.engine.requests.config import EngineConfig
    from holdfast.engine.requests.detail import Detail
    from holdfast.engine.requests.hires import Hires
    from holdfast.engine.requests.img2img import Img2Img
    from holdfast.engine.requests.infotext import Lost, request_from_infotext
    from holdfast.engine.requests.inpaint import Inpaint
    from holdfast.engine.requests.kinds import Request, request_from_json
    from holdfast.engine.requests.lora import Lora
    from holdfast.engine.requests.txt2img import Txt2Img
    from holdfast.engine.requests.untrusted import Bounds, request_from_untrusted_json
    from holdfast.engine.results.recipes import Recipe, recipe_from_image
    from holdfast.engine.results.result import Degradation, Result
    from holdfast.engine.results.saving import request_from_image
    from holdfast.engine.subscribers import (
        CompileHeartbeat,
        Degraded,
        Event,
        Finished,
        Preview,
        Progressed,
        Transition,
    )
    from holdfast.engine.version import __version__ as __version__
    from holdfast.states import Mode, State

__all__ = [
    "Bounds",
    "Cancelled",
    "CompileError",
    "CompileHeartbeat",
    "Degradation",
    "Degraded",
    "Detail",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "Evaluations",
    "Event",
    "Finished",
    "GenerationError",
    "Hires",
    "HoldfastError",
    "IllegalTransition",
    "Img2Img",
    "Inpaint",
    "InvalidRequest",
    "Job",
    "Lora",
    "LoraError",
    "Lost",
    "Mode",
    "ModelFacts",
    "ModelSourceError",
    "Plan",
    "Preview",
    "Progress",
    "Progressed",
    "QueueFull",
    "Recipe",
    "Request",
    "Result",
    "Snapshot",
    "State",
    "Transition",
    "Txt2Img",
    "recipe_from_image",
    "request_from_image",
    "request_from_infotext",
    "request_from_json",
    "request_from_untrusted_json",
]

_HOMES = {
    "holdfast.engine.compiling.plan": ("Plan",),
    "holdfast.engine.engine": ("Engine", "Snapshot"),
    "holdfast.engine.errors": (
        "Cancelled", "CompileError", "EngineClosed", "GenerationError", "HoldfastError",
        "IllegalTransition", "InvalidRequest", "LoraError", "ModelSourceError", "QueueFull",
    ),
    "holdfast.engine.jobs.job": ("Job",),
    "holdfast.engine.jobs.progress": ("Progress",),
    "holdfast.engine.models.facts": ("ModelFacts",),
    "holdfast.engine.requests.cadence": ("Evaluations",),
    "holdfast.engine.requests.config": ("EngineConfig",),
    "holdfast.engine.requests.detail": ("Detail",),
    "holdfast.engine.requests.hires": ("Hires",),
    "holdfast.engine.requests.img2img": ("Img2Img",),
    "holdfast.engine.requests.infotext": ("Lost", "request_from_infotext"),
    "holdfast.engine.requests.inpaint": ("Inpaint",),
    "holdfast.engine.requests.kinds": ("Request", "request_from_json"),
    "holdfast.engine.requests.lora": ("Lora",),
    "holdfast.engine.requests.txt2img": ("Txt2Img",),
    "holdfast.engine.requests.untrusted": ("Bounds", "request_from_untrusted_json"),
    "holdfast.engine.results.recipes": ("Recipe", "recipe_from_image"),
    "holdfast.engine.results.result": ("Degradation", "Result"),
    "holdfast.engine.results.saving": ("request_from_image",),
    "holdfast.engine.subscribers": (
        "CompileHeartbeat", "Degraded", "Event", "Finished", "Preview", "Progressed", "Transition",
    ),
    "holdfast.engine.version": ("__version__",),
    "holdfast.states": ("Mode", "State"),
}  # fmt: skip
__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__

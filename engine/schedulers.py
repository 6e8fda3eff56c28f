"""Schedulers by the names that users know, as diffusers classes and settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """
    One scheduler as users name it.

    Attributes:
        class_name: diffusers' class.
        label: Name in A1111's infotext.
        options: What is set over the model's own scheduler settings.
        longest: The setting that bounds the length of a schedule, and its value where a model has
            none; None where a schedule may have any length.
    """

    class_name: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    longest: tuple[str, int] | None = None


_KARRAS = {"use_karras_sigmas": True}
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_TRAINED = ("num_train_timesteps", 1000)

SCHEDULERS: Mapping[str, SchedulerSpec] = MappingProxyType({
    "euler": SchedulerSpec("EulerDiscreteScheduler", "Euler"),
    "euler-a": SchedulerSpec("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": SchedulerSpec("HeunDiscreteScheduler", "Heun"),
    "lms": SchedulerSpec("LMSDiscreteScheduler", "LMS"),
    "ddim": SchedulerSpec("DDIMScheduler", "DDIM", longest=_TRAINED),
    "ddpm": SchedulerSpec("DDPMScheduler", "DDPM", longest=_TRAINED),
    "pndm": SchedulerSpec("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
    "dpm++2m": SchedulerSpec("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "dpm++2m-karras": SchedulerSpec("DPMSolverMultistepScheduler", "DPM++ 2M Karras", _KARRAS),
    "dpm++2m-sde": SchedulerSpec("DPMSolverMultistepScheduler", "DPM++ 2M SDE", _SDE),
    "dpm++2m-sde-karras": SchedulerSpec(
        "DPMSolverMultistepScheduler", "DPM++ 2M SDE Karras", {**_SDE, **_KARRAS}
    ),
    "dpm++2s": SchedulerSpec("DPMSolverSinglestepScheduler", "DPM++ 2S"),
    "unipc": SchedulerSpec("UniPCMultistepScheduler", "UniPC"),
    "deis": SchedulerSpec("DEISMultistepScheduler", "DEIS"),
    "lcm": SchedulerSpec("LCMScheduler", "LCM", longest=("original_inference_steps", 50)),
    "flow-euler": SchedulerSpec("FlowMatchEulerDiscreteScheduler", "Euler"),
})  # fmt: skip


def check_scheduler(name: str) -> str:
    """
    Return the short name of a scheduler given by short name or by diffusers' class name.

    Raises:
        ValueError: There is none of that name; the text lists those there are.
    """
    wanted = name.strip().lower().replace(" ", "").replace("_", "-")
    found = wanted if wanted in SCHEDULERS else short_name(name.strip())
    if found is not None:
        return found
    msg = f"unknown scheduler; choose one of {', '.join(SCHEDULERS)}, or a diffusers class of these"
    raise ValueError(msg)


def short_name(class_name: str) -> str | None:
    """Return the first key of `SCHEDULERS` with this diffusers class; None where there is none."""
    for short, spec in SCHEDULERS.items():
        if class_name in (spec.class_name, spec.class_name.removesuffix("Scheduler")):
            return short
    return None


def make_scheduler(folder: Path, name: str | None) -> Any:
    """
    Build a fresh diffusers scheduler from the model's own settings.

    Args:
        folder: The model's folder, with ``scheduler/scheduler_config.json``.
        name: A key of `SCHEDULERS`, or None for the model's own class.
    """
    import diffusers

    settings, _ = diffusers.DDIMScheduler.load_config(
        folder / "scheduler", return_unused_kwargs=True
    )
    if name is None:
        return getattr(diffusers, settings["_class_name"]).from_config(settings)
    spec = SCHEDULERS[name]
    return getattr(diffusers, spec.class_name).from_config(settings, **spec.options)


def schedule_length(steps: int, strength: float) -> int:
    """
    Return the length of the schedule of which ``strength`` is exactly ``steps`` steps.

    diffusers' img2img pipelines run the last ``int(length * strength)`` steps of a schedule.
    """
    length = math.floor(steps / strength)
    while int(length * strength) < steps:
        length += 1
    return length

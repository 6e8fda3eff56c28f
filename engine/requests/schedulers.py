"""Schedulers by the names that users know, as diffusers classes and settings."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """
    One scheduler as users name it: a sampler, on its own schedule or another.

    Attributes:
        class_name: diffusers' class.
        label: Name in A1111's infotext.
        options: What it chooses beside the facts of the model's training.
        schedules: Keys of `SCHEDULES` that the sampler can run.
        eta: Its usual share of fresh noise in each step; None where it takes no such share.
    """

    class_name: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    schedules: tuple[str, ...] = ()
    eta: float | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """
    One way to spread a pass's steps over the noise.

    Attributes:
        label: Name in A1111's infotext.
        options: Settings of diffusers' schedulers.
    """

    label: str
    options: Mapping[str, Any]


SCHEDULES: Mapping[str, Schedule] = MappingProxyType({
    "karras": Schedule("Karras", {"use_karras_sigmas": True}),
    "exponential": Schedule("Exponential", {"use_exponential_sigmas": True}),
    "beta": Schedule("Beta", {"use_beta_sigmas": True}),
    "lu": Schedule("Lu", {"use_lu_lambdas": True}),
    "sgm-uniform": Schedule("SGM Uniform", {"timestep_spacing": "trailing"}),
    "simple": Schedule("Simple", {"timestep_spacing": "trailing"}),
    "uniform": Schedule("Uniform", {"timestep_spacing": "linspace"}),
    "leading": Schedule("Leading", {"timestep_spacing": "leading"}),
})  # fmt: skip
"""
What may stand behind a sampler's name, or in `schedule`. ``"sgm-uniform"`` and ``"simple"`` are the
trailing spacing of Lin et al. 2023 (arXiv:2305.08891), as diffusers has both.
"""

_SPACED = ("sgm-uniform", "simple", "uniform", "leading")
_BY_SIGMAS = ("karras", "exponential", "beta")
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_MULTISTEP = (*_BY_SIGMAS, "lu", *_SPACED)

SAMPLERS: Mapping[str, SchedulerSpec] = MappingProxyType({
    "euler": SchedulerSpec("EulerDiscreteScheduler", "Euler", {}, (*_BY_SIGMAS, *_SPACED)),
    "euler-a": SchedulerSpec("EulerAncestralDiscreteScheduler", "Euler a", {}, _SPACED),
    "heun": SchedulerSpec("HeunDiscreteScheduler", "Heun", {}, (*_BY_SIGMAS, *_SPACED)),
    "lms": SchedulerSpec("LMSDiscreteScheduler", "LMS", {}, (*_BY_SIGMAS, *_SPACED)),
    "ddim": SchedulerSpec("DDIMScheduler", "DDIM", {}, _SPACED, eta=0.0),
    "ddpm": SchedulerSpec("DDPMScheduler", "DDPM", {}, _SPACED),
    "pndm": SchedulerSpec("PNDMScheduler", "PLMS", {"skip_prk_steps": True}, _SPACED),
    "dpm++2m": SchedulerSpec("DPMSolverMultistepScheduler", "DPM++ 2M", {}, _MULTISTEP),
    "dpm++2m-sde": SchedulerSpec("DPMSolverMultistepScheduler", "DPM++ 2M SDE", _SDE, _MULTISTEP),
    "dpm++2s": SchedulerSpec("DPMSolverSinglestepScheduler", "DPM++ 2S", {}, _BY_SIGMAS),
    "unipc": SchedulerSpec("UniPCMultistepScheduler", "UniPC", {}, (*_BY_SIGMAS, *_SPACED)),
    "deis": SchedulerSpec("DEISMultistepScheduler", "DEIS", {}, (*_BY_SIGMAS, *_SPACED)),
    "lcm": SchedulerSpec("LCMScheduler", "LCM"),
    "tcd": SchedulerSpec("TCDScheduler", "TCD", eta=0.3),
    "flow-euler": SchedulerSpec(
        "FlowMatchEulerDiscreteScheduler", "Euler FlowMatch", {}, _BY_SIGMAS
    ),
})  # fmt: skip
"""Each sampler on the schedule that the model was made with."""

SCHEDULERS: Mapping[str, SchedulerSpec] = MappingProxyType(
    {
        **SAMPLERS,
        **{
            f"{name}-{schedule}": replace(
                sampler,
                label=f"{sampler.label} {SCHEDULES[schedule].label}",
                options={**sampler.options, **SCHEDULES[schedule].options},
            )
            for name, sampler in SAMPLERS.items()
            for schedule in sampler.schedules
        },
    }
)
"""Every sampler, alone and with each schedule that it can run: ``"dpm++2m-karras"``."""


def check_scheduler(name: str) -> str:
    """
    Return the short name of a scheduler, given by any name that programs have for it.

    These are the keys of `SCHEDULERS`, their labels (A1111's), diffusers' class names, and
    k-diffusion's and ComfyUI's functions such as ``"k_euler_ancestral"`` and ``"dpmpp_2m"``.
    Case, spaces, ``-`` and ``_`` do not matter.

    Raises:
        ValueError: There is none of that name; the text lists those there are, the nearest first.
    """
    names: dict[str, str] = {}
    for short, spec in SCHEDULERS.items():  # a name of several is the first one's
        plain = spec.class_name.removesuffix("Scheduler")
        for each in (short, spec.label, spec.class_name, plain):
            names.setdefault(_plain(each), short)
    wanted = _plain(name)
    for each in (wanted, wanted.removeprefix("sample"), wanted.removeprefix("k")):
        if each in names:
            return names[each]
    near = dict.fromkeys(names[each] for each in difflib.get_close_matches(wanted, names, 3, 0.7))
    meant = f"did you mean {' or '.join(near)}? There are" if near else "choose one of"
    msg = (
        f"unknown scheduler; {meant} {', '.join(SAMPLERS)}, or a diffusers class of these, with or "
        f"without a schedule behind it: {', '.join(SCHEDULES)}"
    )
    raise ValueError(msg)


def _plain(name: str) -> str:
    """Return a name as all programs would write it, without what they differ in."""
    plain = re.sub(r"[\s_-]", "", name.lower()).replace("dpmpp", "dpm++")
    plain = plain.replace("ancestral", "a")
    return plain.removesuffix("ka") + "karras" if plain.endswith("ka") else plain


def check_schedule(name: str) -> str:
    """
    Return the key of a schedule given by it or by its label.

    Raises:
        ValueError: There is none of that name; the text lists those there are.
    """
    known = {_plain(key): key for key in SCHEDULES}
    if _plain(name) not in known:
        msg = f"unknown schedule; choose one of {', '.join(SCHEDULES)}"
        raise ValueError(msg)
    return known[_plain(name)]


def with_schedule(scheduler: str, schedule: str | None) -> str:
    """
    Return the key of a scheduler with its schedule replaced by another; None: as it is.

    Raises:
        ValueError: The sampler cannot run that schedule; the text lists those that it can.
    """
    if schedule is None:
        return scheduler
    sampler = max(
        (name for name in SAMPLERS if scheduler == name or scheduler.startswith(f"{name}-")),
        key=len,
    )
    possible = SAMPLERS[sampler].schedules
    if schedule not in possible:
        can = ", ".join(possible) or "its own alone"
        msg = f"the scheduler {sampler!r} cannot run the schedule {schedule!r}; it can run {can}"
        raise ValueError(msg)
    return f"{sampler}-{schedule}"


def check_eta(scheduler: str) -> None:
    """
    Make sure that a sampler takes a share of fresh noise.

    Raises:
        ValueError: It takes none; the text says which do.
    """
    if scheduler not in SCHEDULERS or SCHEDULERS[scheduler].eta is None:
        taking = " and ".join(repr(name) for name, spec in SAMPLERS.items() if spec.eta is not None)
        msg = f"eta: the scheduler {scheduler!r} takes none; {taking} do"
        raise ValueError(msg)


def short_name(class_name: str, settings: Mapping[str, Any] | None = None) -> str | None:
    """
    Return the key of `SCHEDULERS` with this diffusers class; None where there is none.

    Args:
        class_name: With or without ``Scheduler`` at its end.
        settings: Of a scheduler of that class; None: the first key is meant, whatever its options.
    """
    for short, spec in SCHEDULERS.items():
        if class_name in (spec.class_name, spec.class_name.removesuffix("Scheduler")) and (
            settings is None or _chosen(settings) == _chosen(spec.options)
        ):
            return short
    return None


def _chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells the keys of one class apart, as far as it is not the default."""
    defaults: dict[str, Any] = {
        "algorithm_type": "dpmsolver++",
        "use_beta_sigmas": False,
        "use_exponential_sigmas": False,
        "use_karras_sigmas": False,
        "use_lu_lambdas": False,
    }
    if settings.get("algorithm_type") == "deis":
        defaults["algorithm_type"] = "deis"
    return {
        name: settings.get(name, default)
        for name, default in defaults.items()
        if settings.get(name, default) != default
    }


def flow_length(steps: int, strength: float) -> int:
    """
    Return the length of the schedule of which a flow runs exactly ``steps`` steps.

    diffusers' img2img pipelines for flows leave out the first ``int(length - length * strength)``.
    Of the lengths that do, it is the one whose share is nearest to the strength.
    """
    length = math.floor(steps / strength)
    while length - int(max(length - length * strength, 0)) < steps:
        length += 1
    return length


def schedule_length(steps: int, strength: float) -> int:
    """
    Return the length of the schedule of which ``strength`` is exactly ``steps`` steps.

    diffusers' img2img pipelines run the last ``int(length * strength)`` steps of a schedule.
    """
    length = math.floor(steps / strength)
    while int(length * strength) < steps:
        length += 1
    return length

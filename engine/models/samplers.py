"""
The schedulers of one model: which of its settings they inherit, and which schedules there are.

Facts of the training (betas, what is predicted, how timesteps are spaced) hold for every scheduler
that runs the model. What its own scheduler chooses beside them (the order and kind of a solver,
which sigmas it takes, whether it clips) is no business of another one that was asked for.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import TYPE_CHECKING, Any

from holdfast.engine.errors import HoldfastError, InvalidRequest, ModelSourceError
from holdfast.engine.models.configs import Scheduler, as_config
from holdfast.engine.models.integrity import read_json
from holdfast.engine.requests.schedulers import SCHEDULERS, schedule_length, short_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_FACTS = frozenset({
    "base_image_seq_len", "base_shift", "beta_end", "beta_schedule", "beta_start",
    "max_image_seq_len", "max_shift", "num_train_timesteps", "original_inference_steps",
    "prediction_type", "rescale_betas_zero_snr", "set_alpha_to_one", "shift", "shift_terminal",
    "steps_offset", "time_shift_type", "timestep_spacing", "trained_betas", "use_dynamic_shifting",
})  # fmt: skip
_FLOW_EULER = "FlowMatchEulerDiscreteScheduler"
_BY_SIGMAS = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
)  # fmt: skip
_NEARLY_NOISE, _FEWEST = 0.95, 5
"""Share of the timesteps of which the rest is nearly noise; evaluations before it that draw."""
_LATE = 0.15
"""Share of the training's timesteps by which a schedule may begin late, besides one step."""


class Samplers:
    """
    Makes schedulers from a model's own settings.

    Args:
        folder: The model's folder, with ``scheduler/scheduler_config.json``.

    Raises:
        ModelSourceError: That file is missing or damaged, or does not name a class.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "scheduler" / "scheduler_config.json"
        settings = read_json(self._file)
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self._typed = as_config(settings, self._file, Scheduler)
        self._class_name = self._typed.class_name
        if not self._class_name:
            msg = (
                f"{self._file} does not say of which class the scheduler is (_class_name). Correct "
                "it, or copy, download or export the model again."
            )
            raise ModelSourceError(msg)
        self._made: dict[tuple[str | None, str | None], Any] = {}

    @property
    def _is_flow(self) -> bool:
        flows = self._class_name == _FLOW_EULER
        return flows or self._typed.prediction_type == "flow_prediction"

    @property
    def own_label(self) -> str:
        """The key in `SCHEDULERS` of the model's own scheduler; its class where there is none."""
        return short_name(self._class_name, self._settings) or self._class_name

    def surely(self, name: str | None, steps: int, strength: float) -> bool:
        """Tell, without making it, whether a schedule is one that every scheduler has."""
        class_name = SCHEDULERS[name].class_name if name else self._class_name
        options = SCHEDULERS[name].options if name else self._settings
        zero_snr = bool(self._settings.get("rescale_betas_zero_snr"))
        if short_name(class_name) is None or (zero_snr and any(map(options.get, _BY_SIGMAS))):
            return False
        trained = self._typed.num_train_timesteps
        longest = trained // 4
        if class_name in ("LCMScheduler", "TCDScheduler"):
            longest = min(trained, self._typed.original_inference_steps)
        return schedule_length(steps, strength) <= longest

    def make(self, name: str | None, spacing: str | None = None) -> Any:
        """
        Return a fresh diffusers scheduler; its tables are computed once.

        Args:
            name: A key of `SCHEDULERS`, or None for the model's own class and settings.
            spacing: Of the timesteps, in place of the model's.

        Raises:
            ModelSourceError: diffusers has no such class, or cannot make it of these settings.
        """
        if (name, spacing) not in self._made:
            self._made[name, spacing] = self._build(name, spacing)
        return copy.deepcopy(self._made[name, spacing])

    def _build(self, name: str | None, spacing: str | None) -> Any:
        import diffusers

        settings, options = self._settings, {}
        class_name = self._class_name
        if name is not None:
            settings = {key: value for key, value in settings.items() if key in _FACTS}
            class_name, options = SCHEDULERS[name].class_name, dict(SCHEDULERS[name].options)
            if self._is_flow and class_name != _FLOW_EULER:
                shift = self._settings.get("flow_shift", self._settings.get("shift", 1.0))
                options |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
                options |= {"flow_shift": shift}
        kind: Any = getattr(diffusers, class_name, None)
        if kind is None or "Scheduler" not in class_name:
            msg = (
                f"{self._file} names the scheduler {class_name}, which this diffusers does not "
                "have. Correct it, or ask for another with scheduler=."
            )
            raise ModelSourceError(msg)
        if spacing is not None:
            options["timestep_spacing"] = spacing
        try:
            # Latents are not within -1 and 1: to clip them is for models of pixels.
            return kind.from_config(settings, clip_sample=False, **options)
        except Exception as error:
            msg = (
                f"{self._file} was to become a {class_name}, but {type(error).__name__}: "
                f"{str(error).strip()[:200] or 'a library that it needs is missing'}. Correct it, "
                "or ask for another with scheduler=."
            )
            raise ModelSourceError(msg) from error

    def flow(self, name: str | None, fitting: Sequence[str], length: int) -> Any:
        """
        Return a fresh scheduler for a model that learned a flow; any number of steps fits it.

        Args:
            name: A key of `SCHEDULERS`, or None for the model's own.
            fitting: The keys that run such a model.
            length: Of the schedule, in steps.

        Raises:
            InvalidRequest: It is not among those.
            ModelSourceError: diffusers cannot make the scheduler.
        """
        if name is not None and name not in fitting:
            msg = (
                f"The scheduler {name!r} was asked for, but this model learned a flow, which that "
                f"does not follow. Ask for one of {', '.join(fitting)}, or for none."
            )
            raise InvalidRequest(msg)
        if name is not None and (SCHEDULERS[name].class_name == _FLOW_EULER or name == "euler"):
            name = "flow-euler" if self._class_name != _FLOW_EULER else None
        made = self.make(name)
        if length == 1:  # what has no end beside its beginning cannot be stretched to one
            made.register_to_config(shift_terminal=None)
        return made

    def scheduler(self, name: str | None, steps: int, strength: float, *, whole: bool) -> Any:
        """
        Return a fresh scheduler whose schedule has `strength` in exactly `steps` steps.

        A model whose timesteps are spaced by whole numbers ("leading") begins ever later the more
        steps are asked for, at half of its noise with 501. Where a scheduler goes by sigmas, that
        may lie anywhere, its steps are then spread evenly.

        Args:
            name: A key of `SCHEDULERS`, or None for the model's own.
            steps: That a pass is to run.
            strength: Its part of the schedule, over 0 and at most 1.
            whole: The pipeline fits a schedule of `steps` into the strength itself.

        Raises:
            InvalidRequest: There is no such schedule; the text says how many steps have one.
            ModelSourceError: diffusers cannot make the scheduler.
        """
        check = functools.partial(self._fitting, name, strength=strength, whole=whole)
        found, why = check(steps=steps)
        if found is not None:
            return found
        possible = _fewer(steps, lambda steps: check(steps=steps)[0] is not None)
        called = name or self.own_label
        share = "" if strength == 1 else f" over a strength of {strength:g}"
        advice = "No smaller number has one: ask for more"
        if possible is not None:
            advice = f"Ask for {possible}, which has one"
        elif strength != 1:
            advice = f"no number of steps fits a strength of {strength:g}: raise it"
        msg = (
            f"{steps} steps{share} were asked for, but the scheduler {called!r} has no such "
            f"schedule on this model: {why}. {advice}, or use another scheduler, such as 'euler'."
        )
        raise InvalidRequest(msg)

    def _fitting(
        self, name: str | None, *, steps: int, strength: float, whole: bool
    ) -> tuple[Any, str]:
        """Return a scheduler with such a schedule; or None, and why there is none."""
        why = ""
        for spacing in (None, "linspace"):
            scheduler = self.make(name, spacing)
            if spacing and not (
                hasattr(scheduler, "sigmas")
                and scheduler.config.get("timestep_spacing") == spacing
                and self._typed.timestep_spacing == "leading"
            ):
                break
            fault = _fault(scheduler, steps, strength, whole=whole)
            if not fault:
                return _counted_from_the_first(self.make(name, spacing)), ""
            why = fault
        return None, why


def _fewer(steps: int, has_schedule: Callable[[int], bool]) -> int | None:
    """
    Return a smaller number of steps that has a schedule, found in few tries; None where none is.

    It is the largest one where all below it have a schedule too, as they nearly do: to make every
    schedule from `steps` down to 1 would take seconds.
    """
    tried, least, most = steps - 1, 0, steps
    while least < tried < most:
        if has_schedule(tried):
            least = tried
        else:
            most = tried
        tried = (least + most) // 2
    return least or None


def _fault(scheduler: Any, steps: int, strength: float, *, whole: bool) -> str:
    """Make a schedule, and return what is wrong with it: empty where nothing is."""
    length = steps if whole or strength == 1 else schedule_length(steps, strength)
    settings = {"strength": strength} if whole and strength != 1 else {}
    try:
        scheduler.set_timesteps(length, **settings)
    except HoldfastError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it says is the reason
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200].rstrip('.')}"
    order = getattr(scheduler, "order", 1)
    first = 0 if length == steps else (length - steps) * order
    timesteps = [float(each) for each in scheduler.timesteps]
    trained = scheduler.config.num_train_timesteps
    if hasattr(scheduler, "alphas_cumprod"):
        highest = trained * settings.get("strength", 1.0)  # where such a schedule is to begin
        if timesteps[0] < highest * (1 - _LATE) - highest / length:
            return f"it would begin at timestep {timesteps[0]:g}, and not near {highest:g}"
        if max(timesteps[first:]) > trained - 1:
            return f"it would begin beyond timestep {trained - 1}"
    sigmas = getattr(scheduler, "sigmas", timesteps)  # of which the last is where the run ends
    places = [float(each) for each in sigmas[first : len(timesteps)]]
    if len(set(places)) < steps or not all(map(_is_finite, places)):
        return f"{steps} of its {trained} timesteps would not be distinct"
    if _is_beyond_learning(scheduler, places):
        return "most of it would lie beyond the noise that this model of zero terminal SNR learned"
    return ""


def _is_beyond_learning(scheduler: Any, places: Sequence[float]) -> bool:
    """
    Tell whether a schedule would draw nonsense with a model of zero terminal SNR.

    The last timesteps of such a model are nearly nothing but noise, far above those before (Lin et
    al. 2023, arXiv:2305.08891). What spreads its steps by sigmas spends most of them there.
    """
    config = scheduler.config
    if not config.get("rescale_betas_zero_snr") or not any(map(config.get, _BY_SIGMAS)):
        return False
    kept = float(scheduler.alphas_cumprod[int(_NEARLY_NOISE * config.num_train_timesteps)])
    highest = math.sqrt((1 - kept) / kept)
    return sum(sigma <= highest for sigma in places) < _FEWEST


def _counted_from_the_first(scheduler: Any) -> Any:
    """
    Return a scheduler whose first step is that of its schedule.

    One that is not told finds it by its timestep. Where several steps have the same one, as close
    sigmas have, it takes the second of them, and ends beyond the last.
    """
    if not hasattr(scheduler, "set_begin_index"):
        return scheduler
    set_timesteps = scheduler.set_timesteps

    def set_and_begin(*arguments: Any, **settings: Any) -> None:
        set_timesteps(*arguments, **settings)
        scheduler.set_begin_index(0)

    scheduler.set_timesteps = functools.update_wrapper(set_and_begin, set_timesteps)
    return scheduler


def _is_finite(value: float) -> bool:
    return value - value == 0

"""The schedulers of a model: what they inherit, and which schedules there are."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine.errors import InvalidRequest, ModelSourceError
from holdfast.engine.imports import heavy, quiet
from holdfast.engine.models.samplers import Samplers, _fewer
from holdfast.engine.requests.schedulers import SAMPLERS, SCHEDULERS, schedule_length

if TYPE_CHECKING:
    from pathlib import Path

FACTS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 1,
    "timestep_spacing": "leading",
}  # fmt: skip
SPREAD = sorted(set(SAMPLERS) - {"flow-euler"})
FEW = ("lcm", "tcd")
"""Whose schedules are parts of the one of 50 steps that they were distilled on."""
OTHERS: dict[str, dict[str, Any]] = {
    "deis": {"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis",
             "solver_type": "logrho", "solver_order": 2},
    "sde": {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++",
            "solver_type": "heun", "final_sigmas_type": "sigma_min", "thresholding": False},
    "beta": {"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True},
    "clips": {"_class_name": "DDIMScheduler", "clip_sample": True, "clip_sample_range": 0.5},
}  # fmt: skip


@pytest.fixture(autouse=True)
def libraries() -> None:
    """Imported through the one door, before anything names diffusers."""
    heavy()


def samplers(folder: Path, **settings: Any) -> Samplers:
    """The schedulers of a model with these settings alone."""
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    return Samplers(folder)


def run(scheduler: Any, steps: int) -> Any:
    """Denoise with a network of one line, whose latents are beyond -1 and 1."""
    import torch

    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, 4, 4, generator=generator) * 3 * scheduler.init_noise_sigma
    takes = {"generator": generator} if "Ancestral" in type(scheduler).__name__ else {}
    for timestep in scheduler.timesteps:
        noise = torch.tanh(scheduler.scale_model_input(latents, timestep)) * 0.9
        latents = scheduler.step(noise, timestep, latents, **takes).prev_sample
    return latents


@pytest.mark.parametrize("own", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "dpm++2m-karras", "deis", "unipc", "euler"])
def test_a_scheduler_inherits_facts_of_the_training_alone(
    tmp_path: Path, own: dict[str, Any], name: str
) -> None:
    """What a model's own scheduler chooses does not change another one that was asked for."""
    import diffusers

    made = samplers(tmp_path, **FACTS, **own)
    spec = SCHEDULERS[name]
    clean = {"clip_sample": False} if name == "ddim" else {}
    with quiet():
        plain = getattr(diffusers, spec.class_name).from_config(FACTS, **spec.options, **clean)
        ours = made.scheduler(name, 6, 1.0, whole=False)
        assert (run(ours, 6) - run(plain, 6)).abs().max() == 0


def test_the_own_scheduler_keeps_what_it_chose(tmp_path: Path) -> None:
    """Where none is asked for, all of the model's own settings hold; latents are not clipped."""
    made = samplers(tmp_path, **FACTS, **OTHERS["sde"])
    own = made.scheduler(None, 6, 1.0, whole=False)
    assert (own.config.algorithm_type, own.config.solver_type) == ("sde-dpmsolver++", "heun")
    assert made.own_label == "dpm++2m-sde"
    assert not samplers(tmp_path, **FACTS, **OTHERS["clips"]).make(None).config.clip_sample
    assert samplers(tmp_path, **FACTS, **OTHERS["beta"]).own_label == "euler-beta"


@pytest.mark.parametrize("name", SPREAD)
@pytest.mark.parametrize(
    ("steps", "strength"), [(1, 1.0), (4, 0.5), (30, 1.0), (1, 0.3), (20, 0.6), (249, 1.0)]
)
def test_usual_schedules_are_those_of_diffusers(
    tmp_path: Path, name: str, steps: int, strength: float
) -> None:
    """A schedule that diffusers has is taken as it is, to the last timestep, or refused."""
    import diffusers

    made = samplers(tmp_path, **FACTS, _class_name="DDIMScheduler")
    spec = SCHEDULERS[name]
    length = schedule_length(steps, strength)
    with quiet():
        if name in FEW and length > 50:
            with pytest.raises(InvalidRequest, match="Ask for"):
                made.scheduler(name, steps, strength, whole=False)
            return
        plain = getattr(diffusers, spec.class_name).from_config(FACTS, **spec.options)
        plain.set_timesteps(length)
        ours = made.scheduler(name, steps, strength, whole=False)
        ours.set_timesteps(length)
    assert ours.timesteps.tolist() == plain.timesteps.tolist()
    assert made.surely(name, steps, strength) == (length <= (50 if name in FEW else 250))


ZERO_SNR = FACTS | {
    "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "steps"),
    [("dpm++2m-karras", 10), ("euler-karras", 10), ("euler-beta", 40), ("unipc-karras", 10)],
)
def test_a_schedule_beyond_what_was_learned_is_refused(
    tmp_path: Path, name: str, steps: int
) -> None:
    """With zero terminal SNR sigmas spread over nearly pure noise leave too few for a picture."""
    made = samplers(tmp_path, **ZERO_SNR, _class_name="DDIMScheduler")
    with quiet(), pytest.raises(InvalidRequest, match="beyond the noise that this model"):
        made.scheduler(name, steps, 1.0, whole=False)
    assert not made.surely(name, steps, 1.0)
    with quiet():
        plain = samplers(tmp_path, **FACTS, _class_name="DDIMScheduler")
        assert plain.scheduler(name, steps, 1.0, whole=False)
        assert made.scheduler(name.rpartition("-")[0], steps, 1.0, whole=False)


@pytest.mark.parametrize("name", ["dpm++2m-karras", "unipc-karras", "dpm++2m-lu"])
def test_steps_that_share_a_timestep_are_all_run(tmp_path: Path, name: str) -> None:
    """From the first to the last, which is clean: none is left out, and none is beyond the end."""
    import torch

    made = samplers(tmp_path, **ZERO_SNR, _class_name="DDIMScheduler")
    with quiet():
        scheduler = made.scheduler(name, 40, 1.0, whole=False)
        scheduler.set_timesteps(40)
    timesteps = scheduler.timesteps.tolist()
    assert len(set(timesteps)) < len(timesteps)
    clean = torch.full((1, 4, 4, 4), 0.5)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for step, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[step]
        alpha = 1 / (sigma**2 + 1) ** 0.5
        velocity = (alpha * latents - clean) / (alpha * sigma)  # of the network that knows the end
        latents = scheduler.step(velocity, timestep, latents).prev_sample
    assert scheduler.step_index == 40
    assert (latents - clean).abs().max() < 1e-3


@pytest.mark.parametrize("steps", [501, 600, 750, 999, 1000])
@pytest.mark.parametrize("name", ["euler", "heun", "euler-a", "unipc", "dpm++2m"])
def test_long_schedules_begin_at_pure_noise(tmp_path: Path, name: str, steps: int) -> None:
    """Spaced by whole numbers 600 steps would begin at timestep 600: they are spread instead."""
    made = samplers(tmp_path, **FACTS, _class_name="DDIMScheduler")
    with quiet():
        if steps == 1000 and name in ("dpm++2m", "unipc"):
            with pytest.raises(InvalidRequest, match="Ask for 999,"):
                made.scheduler(name, steps, 1.0, whole=False)
            return
        scheduler = made.scheduler(name, steps, 1.0, whole=False)
        scheduler.set_timesteps(steps)
    assert 990 <= float(scheduler.timesteps[0]) <= 999
    assert len(set(scheduler.sigmas[:-1].tolist())) == steps


@pytest.mark.parametrize("steps", [1, 3, 4, 8])
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.75, 1.0])
def test_a_schedule_that_is_fitted_into_a_strength_begins_there(
    tmp_path: Path, steps: int, strength: float
) -> None:
    """Latent consistency models run as many steps as asked for, from the strength on."""
    made = samplers(tmp_path, **FACTS, _class_name="LCMScheduler")
    with quiet():
        scheduler = made.scheduler(None, steps, strength, whole=True)
        scheduler.set_timesteps(steps, strength=strength)
    assert len(scheduler.timesteps) == steps
    assert abs(float(scheduler.timesteps[0]) - 1000 * strength) <= 20


REFUSED: dict[str, tuple[str | None, int, float, dict[str, Any], str]] = {
    "ddim cannot be spread": ("ddim", 600, 1.0, {}, "begin at timestep 600.*Ask for 500,"),
    "ddim beyond the training": ("ddim", 1000, 1.0, {}, "beyond timestep 999.*Ask for 999"),
    "repeated timesteps": ("dpm++2m", 20, 0.015, {}, "distinct.*Ask for 15,"),
    "lcm's own bound": ("lcm", 60, 1.0, {}, "Ask for 50,"),
    "tcd's own bound": ("tcd", 60, 1.0, {}, "Ask for 50,"),
    "lcm at next to nothing": ("lcm", 1, 0.015, {}, "raise it"),
    "the model's own": (None, 60, 1.0, {"_class_name": "TCDScheduler"}, "Ask for 50,"),
}


@pytest.mark.parametrize(
    ("name", "steps", "strength", "own", "says"), REFUSED.values(), ids=REFUSED
)
def test_a_schedule_that_is_not_there_is_refused(
    tmp_path: Path, name: str | None, steps: int, strength: float, own: dict[str, Any], says: str
) -> None:
    """The refusal tells why, and how many steps have one, which is true."""
    made = samplers(tmp_path, **{**FACTS, "_class_name": "DDIMScheduler", **own})
    with quiet(), pytest.raises(InvalidRequest, match=f"(?s){says}") as told:
        made.scheduler(name, steps, strength, whole=False)
    assert not made.surely(name, steps, strength)
    for fewer in re.findall(r"Ask for (\d+)", str(told.value)):
        with quiet():
            assert made.scheduler(name, int(fewer), strength, whole=False) is not None


@pytest.mark.parametrize("most", [0, 1, 2, 500, 998, 999])
def test_fewer_steps_are_found_in_few_tries(most: int) -> None:
    """Of a thousand numbers of steps the largest that has a schedule is found in eleven tries."""
    tried: list[int] = []

    def has_schedule(steps: int) -> bool:
        tried.append(steps)
        return steps <= most

    assert _fewer(1000, has_schedule) == (most or None)
    assert len(tried) <= 11


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "no class": ({}, "does not say of which class"),
    "a class of nobody": ({"_class_name": "OurScheduler"}, "OurScheduler"),
    "no scheduler": ({"_class_name": "UNet2DModel"}, "UNet2DModel"),
    "a module": ({"_class_name": "schedulers"}, "names the scheduler schedulers"),
    "a library is missing": ({"_class_name": "DPMSolverSDEScheduler"}, "torchsde"),
    "a number for a word": ({"_class_name": "DDIMScheduler", "final_sigmas_type": 0}, "final_sig"),
    "a word for a number": ({"_class_name": "DDIMScheduler", "beta_end": "much"}, "beta_end"),
    "nothing trained": ({"_class_name": "DDIMScheduler", "num_train_timesteps": 0}, "num_train"),
    "an unknown word": ({"_class_name": "DDIMScheduler", "beta_schedule": "steep"}, "steep"),
}


@pytest.mark.parametrize(("settings", "says"), DAMAGED.values(), ids=DAMAGED)
def test_settings_that_make_no_scheduler_are_told(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    """The error is of the model, names the file, and says what it did not like."""
    with quiet(), pytest.raises(ModelSourceError, match=says) as told:
        samplers(tmp_path, **settings).make(None)
    assert "scheduler_config.json" in str(told.value)

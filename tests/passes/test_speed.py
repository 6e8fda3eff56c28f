"""Cheap evaluations through a whole engine, beside diffusers that is made to spare the same."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from holdfast.engine import Detail, Engine, Evaluations, Hires, Txt2Img
from holdfast.engine.imports import heavy, quiet
from holdfast.engine.models.source import resolve
from tests.conftest import ignore
from tests.support.engines import PROMPT, record
from tests.support.parity import assert_same, reusing_features, sparing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STEPS, HIRES_STEPS = 8, 6
HIRES: dict[str, Any] = {
    "prompt": PROMPT, "width": 64, "height": 64, "scale": 1.5, "steps": STEPS, "strength": 0.5,
    "hires_steps": HIRES_STEPS, "guidance": 4.0, "seed": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """
    What is drawn, and which evaluations are cheap, from 0.

    Attributes:
        family: Of `tests.support.families.BUILDERS`.
        first: Cheap ones of the first pass.
        second: Of the second.
        scheduler: By its class, which both programs know.
        shapes: As the engine is asked to compile.
    """

    family: str
    first: tuple[int, ...] = (5, 7)
    second: tuple[int, ...] = (1, 3, 5)
    scheduler: str = "DDIMScheduler"
    shapes: str = "dynamic"


CASES = {
    "sd1": Case("sd1"),
    "sd1, each step evaluated twice, static": Case(
        "sd1", (7, 9, 11, 13), (1, 3, 5, 7, 9), "HeunDiscreteScheduler", "static"
    ),
    "sdxl": Case("sdxl", scheduler="EulerDiscreteScheduler"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_cheap_evaluation_reuses_what_guidance_added(
    open_engine: Callable[..., Engine],
    family: Callable[[str], Path],
    tiny_cache: Path,
    case: Case,
) -> None:
    """Both passes are those of diffusers, without the other half and the deep part there."""
    heavy()
    import diffusers
    import torch

    xl = "XL" if case.family == "sdxl" else ""
    with quiet():
        folder = family(case.family)
        first = getattr(diffusers, f"StableDiffusion{xl}Pipeline").from_pretrained(folder)
        kind = getattr(diffusers, case.scheduler)
        first.scheduler = kind.from_config(first.scheduler.config, clip_sample=False)
        second = getattr(diffusers, f"StableDiffusion{xl}Img2ImgPipeline")(**first.components)

        def reference(pipeline: Any, cheap: tuple[int, ...], **arguments: Any) -> Any:
            pipeline.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(3)
            dynamic = case.shapes == "dynamic"
            features = reusing_features(pipeline.unet) if dynamic else nullcontext()
            with features, sparing(pipeline.unet, cheap):
                return pipeline(
                    PROMPT, guidance_scale=4.0, generator=generator, **arguments
                ).images[0]

        composed = reference(first, case.first, width=64, height=64, num_inference_steps=STEPS)
        enlarged = composed.resize((96, 96), Image.Resampling.LANCZOS)
        length = 2 * HIRES_STEPS
        painted = reference(
            second, case.second, image=enlarged, strength=0.5, num_inference_steps=length
        )

    model = resolve(folder, tiny_cache, ignore).path
    engine = open_engine(model=model, precision="f32", shapes=case.shapes)
    request = Hires(**HIRES, scheduler=case.scheduler, speed="balanced")
    planned = engine.plan(request)
    made = engine.run(request)
    assert_same(made.first_pass[0], np.asarray(composed, np.float64))
    assert_same(made.images[0], np.asarray(painted, np.float64))

    counts = [(len(case.first), 2 * STEPS - 1), (len(case.second), 2 * HIRES_STEPS - 1)]
    if case.scheduler != "HeunDiscreteScheduler":
        counts = [(len(case.first), STEPS), (len(case.second), HIRES_STEPS)]
    wanted = tuple(Evaluations(of - cheap, cheap) for cheap, of in counts)
    assert made.evaluations == wanted
    assert tuple(each.evaluations for each in planned.passes) == wanted
    assert f"pass 1: {wanted[0]} evaluations" in str(planned)
    events = [json.loads(line) for line in engine.config.log_file.read_text().splitlines()]
    told = [e["evaluation"] for e in events if e["event"] == "step.completed"]
    cheap = [*case.first, *(counts[0][1] + each for each in case.second)]
    assert [index for index, each in enumerate(told) if each == "cheap"] == cheap
    ended = [(e["whole"], e["cheap"]) for e in events if e["event"] == "pass.completed"]
    assert ended == [(each.whole, each.cheap) for each in wanted]


@pytest.fixture(scope="module")
def engine(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    log = tmp_path_factory.mktemp("speed") / "log.jsonl"
    with Engine(**settings, log_file=log) as opened:
        yield opened


def test_to_change_the_speed_compiles_nothing(engine: Engine) -> None:
    """Exact and faster requests share every component, and leave no trace in one another."""
    exact = engine.run(Hires(**HIRES))
    log = record(engine)
    faster = [engine.run(Hires(**HIRES, speed=speed)) for speed in ("balanced", "fast")]
    again = engine.run(Hires(**HIRES))
    assert log.compiled == []
    assert exact.images[0].tobytes() == again.images[0].tobytes()
    pictures = {each.images[0].tobytes() for each in (exact, *faster)}
    assert len(pictures) == 3
    assert exact.evaluations == (Evaluations(8), Evaluations(6))
    assert faster[1].evaluations == (Evaluations(6, 2), Evaluations(2, 4))


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_batch_is_made_of_the_single_images(
    settings: dict[str, Any], engine: Engine, tmp_path: Path, at_once: int
) -> None:
    """To the bit: nothing of one image's evaluations goes into another's."""
    with Engine(**settings, images_per_inference=at_once, log_file=tmp_path / "log.jsonl") as one:
        batch = one.run(Hires(**{**HIRES, "batch": 3}, speed="fast"))
    for index, image in enumerate(batch.images):
        alone = engine.run(batch.request_of(index)).images[0]
        assert alone.tobytes() == image.tobytes()


def test_each_pass_has_a_speed_of_its_own(engine: Engine) -> None:
    """The second pass's may differ, and so may a detail's; the picture tells them."""
    region = Detail(boxes=[(8, 8, 40, 40)], steps=6, speed="fast")
    made = engine.run(Hires(**HIRES, speed="balanced", hires_speed="exact", detail=region))
    assert made.evaluations == (Evaluations(6, 2), Evaluations(6), Evaluations(2, 4))
    assert "Speed: balanced" in made.infotext
    assert "Hires speed: exact" in made.infotext
    assert "ADetailer speed: fast" in made.infotext
    likewise = engine.run(Hires(**HIRES, speed="balanced", detail=region.but(speed=None)))
    assert likewise.evaluations[2] == Evaluations(3, 3)
    assert "speed" not in engine.run(Hires(**HIRES)).infotext.lower()


@pytest.mark.parametrize("changes", [{"guidance": 1.0}, {"steps": 5, "hires_steps": 5}])
def test_where_nothing_can_be_reused_every_evaluation_is_whole(
    engine: Engine, changes: dict[str, Any]
) -> None:
    """Without guidance, and in few steps, a fast request is an exact one."""
    exact, fast = (
        engine.run(Hires(**{**HIRES, **changes}, speed=speed)) for speed in ("exact", "fast")
    )
    assert not any(each.cheap for each in fast.evaluations)
    assert exact.images[0].tobytes() == fast.images[0].tobytes()


@pytest.mark.parametrize(
    ("prompt", "whole"),
    [
        ("a red circle AND a blue square :0.5", 6),  # as of any prompt
        ("a [red:blue:5] circle", 7),  # another one from the sixth step on
        ("a [red|blue] circle", 8),
    ],
)
def test_another_prompt_is_never_guided_by_what_the_one_before_added(
    engine: Engine, prompt: str, whole: int
) -> None:
    """Composed prompts reuse as single ones do; a change of the prompt begins anew."""
    request = Txt2Img(
        prompt=prompt, width=64, height=64, steps=8, guidance=4.0, seed=3, guidance_rescale=0.3
    )
    made = engine.run(request.but(speed="balanced"))
    assert made.evaluations == (Evaluations(whole, 8 - whole),)
    same = made.images[0].tobytes() == engine.run(request).images[0].tobytes()
    assert same is (whole == 8)

"""What ``make demo`` shows: hires fix beside what it is not, with the embedded model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.engine.demo import GUIDANCE
from holdfast.engine.demo.sheet import contact_sheet
from holdfast.engine.engine import Engine
from holdfast.engine.requests.config import EngineConfig
from holdfast.engine.requests.hires import Hires
from holdfast.engine.requests.txt2img import Txt2Img
from holdfast.engine.requests.upscalers import upscale_image

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

PROMPTS = (
    "a large red circle on a blue background",
    "a small yellow star left of a large green ring on a white background",
    "a purple heart on a yellow background",
)
_SEED = 7
_HEADINGS = (
    "first pass",
    "enlarged alone\n(Lanczos)",
    "hires fix",
    "pass two as txt2img\n(the bug)",
)


def make_showcase(folder: Path, cache_dir: Path | None) -> str:
    """
    Draw the pictures.

    Args:
        folder: Made if it is not there; what is in it under these names is replaced.
        cache_dir: As an engine's.

    Returns:
        What was made and what it shows, for people.

    Raises:
        HoldfastError: As `Engine.run`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "run.jsonl"
    log.unlink(missing_ok=True)
    rows: list[tuple[str, tuple[Image, ...]]] = []
    with Engine(EngineConfig(cache_dir=cache_dir, log_file=log)) as engine:
        for prompt in PROMPTS:
            result = engine.run(Hires(prompt=prompt, seed=_SEED, guidance=GUIDANCE))
            hires, small = result.images[0], result.first_pass[0]
            if not rows:
                result.save(folder / "hires.png")
                small.save(folder / "first-pass.png")
            lanczos = upscale_image(small, "lanczos", hires.size, "stretch")
            forgetful = Txt2Img(
                prompt=prompt,
                seed=_SEED,
                guidance=GUIDANCE,
                width=hires.width,
                height=hires.height,
            )
            rows.append((prompt, (small, lanczos, hires, *engine.run(forgetful).images)))
    contact_sheet(_HEADINGS, rows).save(folder / "contact-sheet.png")
    return (
        f"{folder / 'first-pass.png'}: pass one, {small.width}x{small.height}, txt2img\n"
        f"{folder / 'hires.png'}: pass two over it, {hires.width}x{hires.height}, img2img; it has "
        "its settings in it\n"
        f"{folder / 'contact-sheet.png'}: both, beside plain enlarging, and beside what a second "
        "pass gives that forgets the first\n"
        f"{log}: every event of the engine; holdfast log show {log}"
    )

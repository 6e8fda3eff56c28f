from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine import Lora, Txt2Img
from tests.support.engines import PROMPT, pixels, record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.engine import Engine

TXT2IMG = Txt2Img(prompt=PROMPT, width=64, height=64, steps=1, seed=7)


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    """Settings of an engine whose cache nobody else uses, with compiled blobs in it."""
    return {"precision": "f32", "cache_dir": tmp_path / "cache", "compiled_cache": True}


def outcomes(engine: Engine) -> tuple[list[str], str, list[str]]:
    """Run an image; return whether each compile hit the cache, the pixels, and what was wrong."""
    log = record(engine)
    image = pixels(engine.run(TXT2IMG))
    engine.close()
    return (
        [event["cache"] for event in log.events("component.compile.completed")],
        image,
        [event["why"] for event in log.events("cache.discarded")],
    )


def blobs(own: dict[str, Any]) -> list[Path]:
    return sorted((own["cache_dir"] / "blobs").glob("*.blob"))


def test_a_second_engine_takes_the_blobs_of_the_first(
    open_engine: Callable[..., Engine], own: dict[str, Any], ink: Path
) -> None:
    """Asked for, compiled blobs are kept; they serve a later engine with the same images."""
    for settings in (own, own | {"lora": (Lora(ink),)}):
        first, image, _ = outcomes(open_engine(**settings))
        assert "miss" in first
        assert outcomes(open_engine(**settings)) == (["hit"] * 3, image, [])
    assert first == ["hit", "miss", "hit"]
    assert len(blobs(own)) == 4


def test_on_a_cpu_no_blobs_are_kept_unasked(
    open_engine: Callable[..., Engine], own: dict[str, Any]
) -> None:
    """A CPU gains too little by blobs: without being asked for none is written."""
    assert outcomes(open_engine(**own | {"compiled_cache": None}))[0] == ["miss"] * 3
    assert blobs(own) == []


def test_a_damaged_blob_is_made_anew(
    open_engine: Callable[..., Engine], own: dict[str, Any]
) -> None:
    """A blob that was changed or cut is noticed before OpenVINO sees it, and replaced."""
    _, image, _ = outcomes(open_engine(**own))
    first, second, _ = blobs(own)
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-1])
    cache, again, reasons = outcomes(open_engine(**own))
    assert sorted(cache) == ["hit", "miss", "miss"]
    assert reasons == ["not the blob that was written under this key, or damaged"] * 2
    assert again == image
    assert outcomes(open_engine(**own)) == (["hit"] * 3, image, [])


def test_a_blob_that_openvino_refuses_is_made_anew(
    open_engine: Callable[..., Engine], own: dict[str, Any]
) -> None:
    """What is whole but cannot be imported, as of another driver, is discarded and compiled."""
    from holdfast.engine.models.diskcache import DiskCache

    _, image, _ = outcomes(open_engine(**own))
    cache = DiskCache(own["cache_dir"], 2**30, lambda *_, **__: None)
    cache.write_blob(blobs(own)[0].stem, b"made by another driver")
    found, again, (reason,) = outcomes(open_engine(**own))
    assert sorted(found) == ["hit", "hit", "miss"]
    assert reason.startswith("OpenVINO refused it: ")
    assert again == image

"""An engine whose cache is emptied, full, or not to be written to."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine import Hires, InvalidRequest, ModelSourceError, Txt2Img
from holdfast.engine.requests.config import users_cache
from holdfast.states import State
from tests.support.engines import pixels, record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.engine import Engine

    Open = Callable[..., Engine]

SMALL = {"prompt": "circle", "width": 64, "height": 64, "steps": 1, "seed": 7}


def test_a_cache_may_be_emptied_under_an_engine(
    open_engine: Open, tiny_sd: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    """
    What is held serves on; what must be read again is exported again, with the same pixels, and
    planned so; and the engine closes whole.
    """
    cache = tmp_path / "cache"
    shutil.copytree(tiny_cache, cache)
    engine = open_engine(model=tiny_sd, cache_dir=cache, precision="f32")
    wanted = pixels(engine.run(Txt2Img(**SMALL)))
    shutil.rmtree(cache)
    log = record(engine)
    assert engine.plan(Txt2Img(**SMALL)).steps == ()
    assert engine.plan(Hires(**SMALL, hires_steps=1)).steps[0].action == "export"
    assert pixels(engine.run(Txt2Img(**SMALL))) == wanted
    assert not log.events("export.started")
    engine.run(Hires(**SMALL, hires_steps=1))
    assert len(log.events("export.completed")) == 1
    engine.unload()
    assert pixels(engine.run(Txt2Img(**SMALL))) == wanted
    shutil.rmtree(cache)
    assert engine.close()
    assert log.events("engine.closed")


@pytest.mark.parametrize("written", ["in place", "replaced", "removed"])
def test_weights_that_are_mapped_may_be_replaced_but_not_cut(
    open_engine: Open, tiny_ir: Path, tmp_path: Path, written: str
) -> None:
    """
    A file that is cut while an engine has it mapped is refused before it is read, which would end
    the process; once it is whole again, the engine goes on. One that was replaced or removed is
    mapped as it was.
    """
    ir = shutil.copytree(tiny_ir, tmp_path / "ir")
    engine = open_engine(model=ir, precision="f32")
    wanted = pixels(engine.run(Txt2Img(**SMALL)))
    weights = ir / "unet" / "openvino_model.bin"
    if written != "in place":
        weights.rename(tmp_path / "held.bin")
    if written == "replaced":
        weights.touch()
    if written == "in place":
        whole = weights.read_bytes()
        os.truncate(weights, 0)
        with pytest.raises(ModelSourceError, match="was written into while"):
            engine.recompile()
        with pytest.raises(ModelSourceError, match="it was cut"):
            engine.run(Txt2Img(**SMALL))
        with pytest.raises(ModelSourceError, match="it was cut"):
            engine.plan(Txt2Img(**SMALL))
        weights.write_bytes(whole)
    else:
        engine.recompile()
    assert engine.state is State.COMPILED_TXT2IMG
    assert pixels(engine.run(Txt2Img(**SMALL))) == wanted


def test_an_8_bit_graph_that_is_cut_is_refused_and_computed_again(
    open_engine: Open, tiny_ir: Path, tmp_path: Path
) -> None:
    """
    One that is cut in the cache while an engine has it mapped is refused before it is read, which
    would end the process; after an unload, and by the next engine, it is computed again. Removed
    or replaced by its like it is mapped as it was, and read again where that is needed.
    """
    cache = tmp_path / "cache"
    engine = open_engine(model=tiny_ir, precision="int8-weights", cache_dir=cache)
    wanted = pixels(engine.run(Txt2Img(**SMALL)))
    (weights,) = cache.glob("exports/*/openvino_model.bin")
    whole = weights.read_bytes()

    os.truncate(weights, len(whole) // 2)
    for work in (engine.recompile, lambda: engine.run(Txt2Img(**SMALL))):
        with pytest.raises(ModelSourceError, match=r"was written into while.*unload\(\)"):
            work()
    assert engine.state is State.COMPILED_TXT2IMG
    log = record(engine)
    engine.unload()
    foreseen = [step for step in engine.plan(Txt2Img(**SMALL)).steps if step.subject == "unet"]
    assert [step.action for step in foreseen] == ["quantize", "read", "compile"]
    assert pixels(engine.run(Txt2Img(**SMALL))) == wanted
    assert [event["entry"] for event in log.events("cache.discarded")] == [weights.parent.name]
    assert not log.events("plan.missed")
    assert weights.read_bytes() == whole

    weights.with_suffix(".new").write_bytes(whole)
    weights.with_suffix(".new").replace(weights)
    assert pixels(engine.run(Txt2Img(**SMALL))) == wanted
    engine.recompile()
    assert len(log.events("export.started")) == 1
    assert not log.events("plan.missed")

    engine.close()
    os.truncate(weights, len(whole) // 2)
    other = open_engine(model=tiny_ir, precision="int8-weights", cache_dir=cache)
    assert pixels(other.run(Txt2Img(**SMALL))) == wanted


def test_a_full_disk_stops_no_request(
    open_engine: Open, tiny_ir: Path, tmp_path: Path, full_disk: Callable[..., Any]
) -> None:
    """Requests, compiles and blobs go on where nothing can be written, and the log has it all."""
    engine = open_engine(
        model=tiny_ir, cache_dir=tmp_path / "cache", precision="f32", compiled_cache=True
    )
    wanted = pixels(engine.run(Txt2Img(**SMALL)))
    log = record(engine)
    with full_disk():
        assert pixels(engine.run(Txt2Img(**SMALL))) == wanted
        engine.run(Hires(**SMALL, hires_steps=1))
        engine.recompile()
    assert pixels(engine.run(Txt2Img(**SMALL))) == wanted
    failed = [event["entry"] for event in log.events("cache.failed")]
    assert {"writing costs.json", "writing blobs"} <= set(failed)
    assert len(set(failed)) == len(failed)
    assert "writing costs.json" in [event["entry"] for event in log.events("cache.recovered")]


def test_an_exported_model_needs_no_cache(open_engine: Open, tmp_path: Path) -> None:
    """On a machine whose cache cannot be made, a folder of OpenVINO IR runs all the same."""
    (tmp_path / "file").touch()
    engine = open_engine(cache_dir=tmp_path / "file", precision="f32")
    assert engine.run(Txt2Img(**SMALL)).images
    assert engine.close()


def test_an_export_without_room_says_so(
    open_engine: Open, tiny_sd: Path, tmp_path: Path, full_disk: Callable[..., Any]
) -> None:
    """The error names disk space and how much of it there is, not what a library makes of it."""
    engine = open_engine(model=tiny_sd, cache_dir=tmp_path / "cache")
    with (
        full_disk(20_000),
        pytest.raises(ModelSourceError, match=r"could not be written.*MiB are free"),
    ):
        engine.load()
    assert not [path for path in (tmp_path / "cache" / "exports").iterdir() if path.is_dir()]


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no home is known, and no cache is named, the error says which setting helps."""
    with pytest.raises(InvalidRequest, match="cache_dir, or set HOME"):
        users_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert users_cache().name == "holdfast"

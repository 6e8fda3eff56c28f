from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from holdfast.engine import CompileError, Hires, InvalidRequest, Lora, LoraError, Txt2Img
from holdfast.states import State
from tests.support.engines import (
    PROMPT,
    compiler_of,
    live_components,
    opened,
    pipeline_of,
    pixels,
    record,
    write_lora,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from holdfast.engine import Engine

TXT2IMG = Txt2Img(prompt=PROMPT, width=64, height=64, steps=2, seed=7)
HIRES = Hires(prompt=PROMPT, width=64, height=64, steps=2, seed=7, strength=0.6)


@pytest.fixture(scope="module")
def engine(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with opened(settings, tmp_path_factory.mktemp("log")) as engine:
        engine.load()
        yield engine
        engine.configure(lora=())


# Toggling -----------------------------------------------------------------------------------------


def test_a_lora_toggled_back_is_a_reuse(engine: Engine, ink: Path, chalk: Path) -> None:
    """Each LoRA set is compiled once; going back to one changes no state and compiles nothing."""
    sets = [(), (Lora(ink),), (Lora(ink), Lora(chalk, -0.4)), (Lora(ink, -1.0),)]
    images = {}
    for each in sets:
        engine.configure(lora=each)
        images[each] = pixels(engine.run(TXT2IMG))
    assert len(set(images.values())) == len(sets)
    log = record(engine)
    for each in (*reversed(sets), *sets):
        engine.configure(lora=each)
        assert pixels(engine.run(TXT2IMG)) == images[each]
    assert log.compiled == log.states == []
    assert set(log.reused) == {"text_encoder", "unet"}


def test_the_order_of_a_set_does_not_matter(engine: Engine, ink: Path, chalk: Path) -> None:
    """The same LoRAs in another order are the same set, to the bit."""
    engine.configure(lora=(Lora(ink, 0.5), Lora(chalk, 0.5)))
    image, log = pixels(engine.run(TXT2IMG)), record(engine)
    engine.configure(lora=(Lora(chalk, 0.5), Lora(ink, 0.5)))
    assert pixels(engine.run(TXT2IMG)) == image
    assert log.compiled == log.reused == []


def test_a_weight_of_nothing_is_no_lora(engine: Engine, ink: Path) -> None:
    """With weight 0 a LoRA changes nothing and compiles nothing."""
    engine.configure(lora=())
    image, log = pixels(engine.run(TXT2IMG)), record(engine)
    engine.configure(lora=(Lora(ink, 0.0),))
    assert pixels(engine.run(TXT2IMG)) == image
    assert log.states == log.compiled == []
    assert engine.snapshot().lora == ()


def test_no_layer_stays_in_memory(engine: Engine, ink: Path, chalk: Path) -> None:
    """After a change nothing is kept of the files but what identifies them."""
    engine.configure(lora=(Lora(ink, 0.9), Lora(chalk, 0.9)))
    assert not compiler_of(engine).loras._contents
    engine.run(HIRES.but(hires_lora=(Lora(chalk, 0.2),)))
    assert not compiler_of(engine).loras._contents


# A set for the second pass ------------------------------------------------------------------------


def test_the_second_pass_has_a_lora_set_of_its_own(
    open_engine: Callable[..., Engine], ink: Path
) -> None:
    """
    Pass one runs without the style and pass two with it; the recompile returns to img2img.

    The same request again compiles nothing, and neither does one without the style.
    """
    engine = open_engine(precision="f32")
    plain = engine.run(HIRES)
    styled = HIRES.but(hires_lora=(Lora(ink, 0.8),))
    log = record(engine)
    first = engine.run(styled)
    assert log.compiled == ["unet"]
    assert log.states == [
        "compiled-img2img", "compiled-txt2img", "compiled-img2img",
        "recompiling.img2img", "compiled-img2img",
    ]  # fmt: skip
    passes = log.events("pass.started")
    assert [event["lora"] for event in passes] == [[], ["ink@0.8"]]
    assert [event["mode"] for event in passes] == ["txt2img", "img2img"]
    assert engine.snapshot().lora == ("ink@0.8",)
    assert first.first_pass[0].tobytes() == plain.first_pass[0].tobytes()
    assert pixels(first) != pixels(plain)

    log = record(engine)
    assert pixels(engine.run(styled)) == pixels(first)
    assert pixels(engine.run(HIRES)) == pixels(plain)
    assert log.compiled == []
    assert "recompiling.img2img" not in log.states


def test_an_empty_set_for_the_second_pass_is_none(
    open_engine: Callable[..., Engine], ink: Path
) -> None:
    """An engine's LoRA is in pass two as well, unless the request gives pass two an empty set."""
    engine = open_engine(precision="f32", lora=(Lora(ink, 0.8),))
    log = record(engine)
    engine.run(HIRES)
    engine.run(HIRES.but(hires_lora=()))
    told = [event["lora"] for event in log.events("pass.started")]
    assert told == [["ink@0.8"], ["ink@0.8"], ["ink@0.8"], []]
    assert engine.state is State.COMPILED_IMG2IMG
    assert engine.config.lora == (Lora(ink, 0.8),)


def test_a_set_for_the_second_pass_is_refused_before_the_first(
    engine: Engine, tmp_path: Path
) -> None:
    """A second pass's LoRA that cannot be read fails the request before a step is run."""
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    log = record(engine)
    with pytest.raises(LoraError, match="torn"):
        engine.run(HIRES.but(hires_lora=(Lora(tmp_path / "torn.safetensors"),)))
    assert log.events("pass.started", "state.changed") == []


# Files that change --------------------------------------------------------------------------------


def test_a_file_that_changes_is_another_lora(engine: Engine, tiny_ir: Path, tmp_path: Path) -> None:
    """A LoRA file that was written anew is noticed: what is in force is what the file holds now."""
    path = write_lora(tiny_ir, tmp_path / "draft.safetensors", seed=5)
    engine.configure(lora=(Lora(path),))
    image = pixels(engine.run(TXT2IMG))
    write_lora(tiny_ir, path, seed=6)
    log = record(engine)
    engine.configure(lora=(Lora(path),))
    assert log.compiled == ["unet"]
    assert pixels(engine.run(TXT2IMG)) != image


def test_a_file_that_is_gone_is_needed_only_to_fuse(
    open_engine: Callable[..., Engine], ink: Path, tmp_path: Path
) -> None:
    """
    What is compiled stays in service without its file; what must be fused again fails, and is told.

    A recompile that cannot be done leaves what serves as it is.
    """
    path = tmp_path / "loan.safetensors"
    shutil.copy(ink, path)
    engine = open_engine(precision="f32", lora=(Lora(path),))
    image, components = pixels(engine.run(TXT2IMG)), live_components()
    path.unlink()
    assert pixels(engine.run(TXT2IMG)) == image
    with pytest.raises((LoraError, CompileError), match="loan"):
        engine.recompile()
    assert engine.state is State.COMPILED_TXT2IMG
    assert pixels(engine.run(TXT2IMG)) == image
    assert live_components() == components


def test_fused_weights_are_those_of_every_shape(
    open_engine: Callable[..., Engine], ink: Path
) -> None:
    """A LoRA works in static as in dynamic: the images agree to a level or two in f32."""
    images = []
    for shapes in ("dynamic", "static"):
        engine = open_engine(precision="f32", shapes=shapes, lora=(Lora(ink),))
        images.append(np.asarray(engine.run(TXT2IMG).images[0], np.int16))
        engine.close()
    assert np.abs(images[0] - images[1]).max() <= 2


# Links, tags and blocks ---------------------------------------------------------------------------


def test_a_link_is_known_by_its_own_name(engine: Engine, ink: Path, tmp_path: Path) -> None:
    """A link as the hub's cache keeps it is judged and shown as given, whatever it points to."""
    (tmp_path / "5f2c").write_bytes(ink.read_bytes())
    (tmp_path / "style.safetensors").symlink_to(tmp_path / "5f2c")
    engine.configure(lora=(Lora(ink),))
    log = record(engine)
    engine.configure(lora=(Lora(tmp_path / "style.safetensors"),))
    assert log.compiled == []
    engine.configure(lora=(Lora(tmp_path / "style.safetensors", 0.9),))
    result = engine.run(TXT2IMG)
    assert "style@0.9" in result.infotext
    assert [event["lora"] for event in log.events("pass.started")] == [["style@0.9"]]


@pytest.mark.parametrize("tag", ["<lora:ink:0.8>", "<lyco:ink>", "<hypernet:ink:1:2>"])
def test_tags_that_add_nothing_are_refused(engine: Engine, tag: str) -> None:
    """A tag without a folder to find it in, or in a negative prompt, stops before anything runs."""
    log = record(engine)
    for request in (
        TXT2IMG.but(prompt=f"{PROMPT} {tag}"),
        TXT2IMG.but(negative_prompt=tag),
        HIRES.but(hires_prompt=f"{PROMPT} {tag}"),
    ):
        with pytest.raises(InvalidRequest, match=r"no lora_dir|no hypernetworks|adds no LoRA"):
            engine.run(request)
    assert log.events("pass.started") == []
    engine.run(TXT2IMG.but(prompt=f"{PROMPT} <lora> 3 < 4 > 2"))


def test_tags_are_told_where_that_is_allowed(open_engine: Callable[..., Engine]) -> None:
    """With strict=False a tag is read as words and told in the result; logs keep it private."""
    engine = open_engine(precision="f32", strict=False, prompt_syntax="plain")
    log = record(engine)
    result = engine.run(TXT2IMG.but(prompt="a red circle <lora:ink:0.8>"))
    assert [(each.kind, each.asked) for each in result.degradations] == [
        ("tags_unused", "<lora:ink:0.8>")
    ]
    (event,) = log.events("degradation")
    assert "ink" not in str(event)


def test_blocks_are_part_of_what_is_compiled(engine: Engine, chalk: Path) -> None:
    """A factor for blocks compiles what it changes alone, and is told by log and infotext."""
    engine.configure(lora=(Lora(chalk),))
    image, log = pixels(engine.run(TXT2IMG)), record(engine)
    engine.configure(lora=(Lora(chalk, blocks={"unet.up_blocks.*": 0.5}),))
    assert log.compiled == ["unet"]
    result = engine.run(TXT2IMG)
    assert pixels(result) != image
    assert "chalk@1[unet.up_blocks.*=0.5]" in result.infotext
    engine.configure(lora=(Lora(chalk, blocks={"text_encoder.*": 0}),))
    service = pipeline_of(engine).store.service
    assert service["unet"].key.lora
    assert not service["text_encoder"].key.lora
    with pytest.raises(LoraError, match=r"blocks 'text_encoder_2.\*'.* changes text_encoder, unet"):
        engine.configure(lora=(Lora(chalk, blocks={"text_encoder_2.*": 0}),))
    engine.configure(lora=(Lora(chalk),))
    assert pixels(engine.run(TXT2IMG)) == image


def test_blocks_cross_json() -> None:
    """A LoRA with blocks is read back equal, in their order; no pattern lacks a component."""
    lora = Lora("x.safetensors", 0.5, blocks={"unet.b*": 1, "unet.*": 0, "text_encoder.*": -1})
    assert Lora.from_json(lora.to_json()) == lora
    assert [pattern for pattern, _ in lora.blocks] == ["unet.b*", "unet.*", "text_encoder.*"]
    assert len({lora, Lora("x.safetensors", 0.5)}) == 2
    for wrong in (
        {"up_blocks": 1},
        {"*": 1},
        {"unet.": 1},
        {"unet.*": 11},
        {"unet.*": float("nan")},
    ):
        with pytest.raises(InvalidRequest, match="blocks"):
            Lora("x.safetensors", blocks=wrong)

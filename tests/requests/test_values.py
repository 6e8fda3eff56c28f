"""What every value refuses and how it says so; paths; JSON there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from holdfast.engine import EngineConfig, Hires, InvalidRequest, Lora, Txt2Img

PATHS = ("cache_dir", "log_file", "flight_recorder", "model", "vae")


@pytest.mark.parametrize("field", PATHS)
def test_a_tilde_stands_for_the_home_in_every_path(
    field: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``~`` is the home in each path that a host may set, and a path may be given as bytes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert getattr(EngineConfig(**{field: "~/x"}), field) == tmp_path / "x"
    assert getattr(EngineConfig(**{field: b"~/x"}), field) == tmp_path / "x"
    assert Lora("~/x.safetensors").path == tmp_path / "x.safetensors"


def test_a_lora_that_is_no_safetensors_file_is_refused_where_it_is_named() -> None:
    """The ending decides, before any file is looked for."""
    assert Lora("X.SAFETENSORS").name == "X"
    for path in ("x.ckpt", "x", "/etc/hostname"):
        with pytest.raises(InvalidRequest, match="others are pickles"):
            Lora(path)


@pytest.mark.parametrize("field", PATHS)
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("~nosuchuser/x", "the home that ~nosuchuser stands for is not known"),
        ("a\0b", "no null byte"),
        ("\ud83d", "no file here can have this name"),
        (3, "a path is needed, not int"),
    ],
)
def test_a_path_that_is_none_is_refused(field: str, given: object, says: str) -> None:
    """An unknown user, a null byte and what is no path are told for what they are."""
    with pytest.raises(InvalidRequest, match=says):
        EngineConfig(**{field: given})
    with pytest.raises(InvalidRequest, match=says):
        Lora(given)  # type: ignore[arg-type]


def test_a_path_of_any_bytes_comes_back_from_json() -> None:
    """A name in another encoding than this machine's is the same path after JSON."""
    config = EngineConfig(model=Path("/models/gr\udcf6\udcdfe"))
    assert EngineConfig.from_json(config.to_json()) == config


TEXTS = (
    lambda text: Txt2Img(prompt=text),
    lambda text: Txt2Img(negative_prompt=text),
    lambda text: Hires(hires_prompt=text),
    lambda text: EngineConfig(device=text),
    lambda text: Txt2Img.from_json(json.dumps({"prompt": text})),
)


@pytest.mark.parametrize("make", TEXTS)
def test_half_of_a_character_is_refused(make: Any) -> None:
    """A lone surrogate in any text is told with its place, in an error that can be printed."""
    with pytest.raises(
        InvalidRequest, match=r"half of a character \(U\+D83D at position 6\)"
    ) as no:
        make("a cat \ud83d")
    str(no.value).encode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "nil",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"seed": ' + "9" * 5000 + "}",
        b"\xff\xfe\xfd",
        None,
    ],
    ids=["empty", "a list", "a word", "deep lists", "deep objects", "digits", "bytes", "None"],
)
def test_what_is_no_json_is_refused(text: Any) -> None:
    """JSON that is none, too deep, or has numbers without end is an error of Holdfast's own."""
    with pytest.raises(InvalidRequest, match="cannot be read"):
        Txt2Img.from_json(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 10**6000},
        {"seed": -(10**6000)},
        {"prompt": ["x"] * 10**6},
        {"x" * 10**6: 1},
        {"\ud83d": 1},
        {"scheduler": "x" * 10**6},
    ],
    ids=["huge", "negative", "list", "name", "half a name", "scheduler"],
)
def test_an_error_is_short_and_can_be_printed(fields: dict[str, Any]) -> None:
    """Whatever is given, the error names the field, is short, and is text."""
    with pytest.raises(InvalidRequest, match="cannot be made as asked") as refused:
        Txt2Img(**fields)
    assert len(str(refused.value).encode()) < 1000


@pytest.mark.parametrize(
    "fields", [{"seed": -1}, {"width": 0}, {"hires_width": 0}, {"hires_steps": 0}]
)
def test_what_other_programs_leave_out_by_a_number_is_told(fields: dict[str, int]) -> None:
    """A seed of -1, or a side or steps of 0, is refused with the word that it may be left out."""
    with pytest.raises(InvalidRequest, match="leave it out to have it chosen"):
        Hires(**fields)


def test_the_last_seed_of_a_batch_is_one_that_can_be_asked_for() -> None:
    """A batch that would count beyond the range is refused; a seed at its end is not."""
    last = 2**63 - 1
    assert Txt2Img(seed=last).seed == last
    assert Txt2Img(seed=last - 1, batch=2).batch == 2
    with pytest.raises(InvalidRequest, match="take a smaller seed"):
        Txt2Img(seed=last, batch=2)

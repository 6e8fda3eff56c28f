from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from holdfast.engine.errors import ModelSourceError
from holdfast.engine.imports import quiet
from holdfast.engine.model import Model
from holdfast.engine.prompts import Prompts
from holdfast.engine.source import resolve

from ..conftest import ignore  # noqa: TID252 - tests are no installed package

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WORDS = st.sampled_from(
    ["a", "large", "RED", "circle,", "(background:1.3)", "naïve", "don't", "1920", "猫", "🌳", "--"]
)
PROMPTS = st.lists(WORDS, max_size=60).map(" ".join) | st.text(max_size=120)


@pytest.fixture(scope="module")
def load(tiny_ir: Path, tiny_cache: Path) -> Callable[..., Model]:
    """Loads the tiny model, whose tokenizer may lie in another folder."""

    def load(parts: Path = tiny_ir) -> Model:
        model = Model(resolve(tiny_ir, tiny_cache, ignore))
        model.parts = parts
        return model

    return load


@pytest.fixture(scope="module")
def model(load: Callable[..., Model]) -> Model:
    return load()


@pytest.fixture
def parts(tiny_ir: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the tokenizer."""
    return shutil.copytree(tiny_ir / "tokenizer", tmp_path / "tokenizer").parent


@given(prompt=PROMPTS)
def test_what_is_not_read_begins_where_the_text_encoder_stops(model: Model, prompt: str) -> None:
    """The words that are cut are those after the tokens that transformers' tokenizer gives it."""
    tokenizer = model.tokenizers()["tokenizer"]
    room = tokenizer.model_max_length - 2
    with quiet():
        tokens = tokenizer(prompt, add_special_tokens=False).input_ids
    unread = Prompts().unread(prompt, model)
    assert bool(unread) == (len(tokens) > room)
    assert prompt.rstrip().endswith(unread)


@given(prompt=PROMPTS)
def test_a_prompt_is_read_up_to_where_it_was_cut(model: Model, prompt: str) -> None:
    """What is left of a prompt when the unread words are taken off it is read to its end."""
    prompts = Prompts()
    unread = prompts.unread(prompt, model)
    assert not prompts.unread(prompt.rstrip().removesuffix(unread), model)


def test_a_folder_of_older_files_is_read_as_well(
    model: Model, load: Callable[..., Model], parts: Path
) -> None:
    """Where a tokenizer is vocabulary and merges alone, the same words are found unread."""
    file = parts / "tokenizer" / "tokenizer.json"
    tables = json.loads(file.read_text())["model"]
    (parts / "tokenizer" / "vocab.json").write_text(json.dumps(tables["vocab"]))
    merges = (" ".join(pair) for pair in tables["merges"])
    (parts / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    file.unlink()
    prompt = "circle " * 75 + "dog star"
    older = Prompts().unread(prompt, load(parts))
    assert older == Prompts().unread(prompt, model) == "dog star"


def test_a_file_that_pads_or_cuts_is_read_as_well(
    model: Model, load: Callable[..., Model], parts: Path
) -> None:
    """A tokenizer that was saved while it padded and cut, as the demo model's, does neither."""
    file = str(parts / "tokenizer" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.enable_padding(length=77)
    tokenizer.enable_truncation(77)
    tokenizer.save(file)
    padding = load(parts)
    for prompt in ("circle", "circle " * 75 + "dog star"):
        assert Prompts().unread(prompt, padding) == Prompts().unread(prompt, model)


def test_a_damaged_tokenizer_is_told(load: Callable[..., Model], parts: Path) -> None:
    """A file that cannot be read is an error that names it."""
    file = parts / "tokenizer" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ModelSourceError, match=f"{file} cannot be read"):
        Prompts().unread("circle", load(parts))

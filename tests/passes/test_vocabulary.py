from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from holdfast.engine import Engine, Txt2Img
from holdfast.engine.errors import ModelSourceError
from holdfast.engine.imports import quiet
from holdfast.engine.models.model import Model
from holdfast.engine.models.source import resolve
from holdfast.engine.passes.vocabulary import vocabulary
from tests.conftest import ignore
from tests.support.engines import pixels

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
def test_words_have_the_ids_that_transformers_gives_them(model: Model, prompt: str) -> None:
    """The model's file, read without transformers, says the same, special tokens included."""
    tokenizer = model.tokenizers()["tokenizer"]
    found = vocabulary(model, "tokenizer")
    with quiet():
        assert found.ids(prompt) == tokenizer(prompt, add_special_tokens=False).input_ids
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (found.start, found.end, found.padding) == special
    assert [found.comma] == found.ids(",")


def test_a_folder_of_older_files_is_read_as_well(
    model: Model, load: Callable[..., Model], parts: Path
) -> None:
    """Where a tokenizer is vocabulary and merges alone, words have the same ids."""
    file = parts / "tokenizer" / "tokenizer.json"
    tables = json.loads(file.read_text())["model"]
    (parts / "tokenizer" / "vocab.json").write_text(json.dumps(tables["vocab"]))
    merges = (" ".join(pair) for pair in tables["merges"])
    (parts / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    file.unlink()
    older, newer = vocabulary(load(parts), "tokenizer"), vocabulary(model, "tokenizer")
    prompt = "circle, " * 75 + "dog star"
    assert older.ids(prompt) == newer.ids(prompt)
    for fact in ("start", "end", "padding", "comma"):
        assert getattr(older, fact) == getattr(newer, fact)


def test_a_file_that_pads_or_cuts_is_read_as_well(
    model: Model, load: Callable[..., Model], parts: Path
) -> None:
    """A tokenizer that was saved while it padded and cut, as the demo model's, does neither."""
    file = str(parts / "tokenizer" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.enable_padding(length=77)
    tokenizer.enable_truncation(77)
    tokenizer.save(file)
    padding, plain = vocabulary(load(parts), "tokenizer"), vocabulary(model, "tokenizer")
    for prompt in ("circle", "circle " * 75 + "dog star"):
        assert padding.ids(prompt) == plain.ids(prompt)


def test_a_damaged_tokenizer_is_told(load: Callable[..., Model], parts: Path) -> None:
    """A file that cannot be read is an error that names it."""
    file = parts / "tokenizer" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ModelSourceError, match=f"{file} cannot be read"):
        vocabulary(load(parts), "tokenizer")


def test_two_models_of_one_text_encoder_have_their_own_tokenizers(
    tiny_ir: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    """
    Where only the tokenizer is another, so are the embeddings.

    An engine that has served the one model makes the pictures of the other as a new one does.
    """
    other = shutil.copytree(tiny_ir, tmp_path / "other")
    file = other / "tokenizer" / "tokenizer.json"
    whole = json.loads(file.read_text())
    table = whole["model"]["vocab"]
    words = [word for word in table if word.endswith("</w>")][-40:]
    moved = dict(zip(words, reversed([table[word] for word in words]), strict=True))
    whole["model"]["vocab"] = table | moved
    file.write_text(json.dumps(whole))
    words_alone = other / "tokenizer" / "vocab.json"
    if words_alone.exists():
        words_alone.write_text(json.dumps(whole["model"]["vocab"]))
    prompt = " ".join(word.removesuffix("</w>") for word in words[:12])
    request = Txt2Img(prompt=prompt, width=64, height=64, steps=1, seed=7)
    with Engine(**settings | {"model": str(other)}) as engine:
        right = pixels(engine.run(request))
    with Engine(**settings) as engine:
        first = pixels(engine.run(request))
        engine.configure(model=str(other))
        assert pixels(engine.run(request)) == right
        engine.configure(model=settings["model"])
        assert pixels(engine.run(request)) == first
    assert first != right

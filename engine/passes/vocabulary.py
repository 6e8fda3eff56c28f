"""
Words as the numbers that a text encoder knows them by.

Found with `tokenizers` alone, from the model's own file: a request is checked and planned before
anything is compiled, and so before torch and transformers can come in beside a compile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.engine.errors import ModelSourceError
from holdfast.engine.imports import quiet
from holdfast.engine.models.integrity import read_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.engine.models.model import Model

SPECIAL_TOKENS = 2
"""That stand around every prompt: its beginning and its end."""


@dataclass(frozen=True)
class Vocabulary:
    """
    One tokenizer of a model.

    Attributes:
        ids: Returns the ids of a text, without beginning and end.
        start: Id of the beginning.
        end: Id of the end.
        padding: Id of what fills the places that are left.
        comma: Id of a comma that stands alone, or None.
    """

    ids: Callable[[str], list[int]]
    start: int
    end: int
    padding: int
    comma: int | None


def vocabulary(model: Model, name: str) -> Vocabulary:
    """
    Read one tokenizer of a model.

    Raises:
        ModelSourceError: It cannot be read.
    """
    folder = model.parts / name
    if not (folder / "tokenizer.json").exists():
        return _from_transformers(model.tokenizers()[name])
    return _from_file(folder)


def _from_file(folder: Path) -> Vocabulary:
    import tokenizers

    file = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        msg = f"{file} cannot be read ({error}). Download or export the model again."
        raise ModelSourceError(msg) from error
    tokenizer.no_truncation()  # which a file may ask for, as it was last used
    tokenizer.no_padding()
    named = folder / "special_tokens_map.json"
    settings = {
        **(read_json(named) if named.exists() else {}),
        **read_json(folder / "tokenizer_config.json"),
    }

    def special(key: str, otherwise: str) -> int:
        given = settings.get(key) or otherwise
        text = given["content"] if isinstance(given, dict) else given
        found = tokenizer.token_to_id(text)
        return 0 if found is None else int(found)

    return Vocabulary(
        ids=lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        start=special("bos_token", "<|startoftext|>"),
        end=special("eos_token", "<|endoftext|>"),
        padding=special("pad_token", "<|endoftext|>"),
        comma=tokenizer.token_to_id(",</w>"),
    )


def _from_transformers(tokenizer: Any) -> Vocabulary:

    def ids(text: str) -> list[int]:
        with quiet():
            found: list[int] = tokenizer(text, add_special_tokens=False, truncation=False).input_ids
        return found

    return Vocabulary(
        ids=ids,
        start=tokenizer.bos_token_id,
        end=tokenizer.eos_token_id,
        padding=tokenizer.pad_token_id,
        comma=tokenizer.get_vocab().get(",</w>"),
    )

"""
Prompts on their way to the denoiser: how much of them is read, and what they become.

How much is read is found with `tokenizers` alone, from the model's own file: a request is checked
before anything is compiled, and so before torch and transformers can come in beside a compile.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from holdfast.engine.errors import ModelSourceError
from holdfast.engine.faults import generation_errors
from holdfast.engine.imports import quiet
from holdfast.engine.integrity import read_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from tokenizers import Tokenizer

    from holdfast.engine.model import Model
    from holdfast.engine.passes import PassSpec
    from holdfast.engine.views import View

    Reader = Callable[[str], str]


class Prompts:
    """
    Checks and encodes prompts, and keeps the last few.

    Args:
        limit: How many are kept.
    """

    def __init__(self, limit: int = 16) -> None:
        self._limit = limit
        self._known: dict[tuple[object, ...], dict[str, torch.Tensor]] = {}
        self._readers: dict[Path, Reader] = {}

    def unread(self, prompt: str, model: Model) -> str:
        """
        Return the end of a prompt that the text encoders would not see; empty if they see it all.

        Raises:
            ModelSourceError: A tokenizer cannot be read.
        """
        ends = []
        for name in model.tokenizer_names:
            folder = model.parts / name
            if folder not in self._readers:
                self._readers[folder] = _reader(model, name)
            ends.append(self._readers[folder](prompt))
        return max(ends, key=len, default="")

    def encode(
        self, spec: PassSpec, view: View, model: Model
    ) -> tuple[bool, dict[str, torch.Tensor]]:
        """
        Return whether a text encoder ran, and the embeddings by the pipeline's argument names.

        Args:
            spec: Has prompt and negative prompt, and says whether guidance needs the latter.
            view: Its text encoders run, unless they have seen this prompt lately.
            model: Names what ``encode_prompt`` returns.

        Raises:
            GenerationError: A text encoder failed.
        """
        family = model.family
        guided = spec.geometry.guided and not family.guided_by_embedding
        encoders = tuple(view.components[name].key for name in family.text_encoders)
        key = (encoders, spec.prompt, spec.negative_prompt if guided else None)
        fresh = key not in self._known
        if fresh:
            with generation_errors("encode the prompt"), quiet():
                rows = view.pipeline.encode_prompt(
                    prompt=spec.prompt,
                    device=view.pipeline.device,
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=guided,
                    # Some families encode no negative prompt otherwise than an empty one.
                    negative_prompt=spec.negative_prompt or None,
                )
            named = zip(family.prompt_outputs, rows, strict=True)
            self._known[key] = {name: row for name, row in named if row is not None}
        self._known[key] = self._known.pop(key)
        while len(self._known) > self._limit:
            del self._known[next(iter(self._known))]
        return fresh, self._known[key]

    def clear(self) -> None:
        """Forget them all."""
        self._known.clear()
        self._readers.clear()


def _reader(model: Model, name: str) -> Reader:
    """Return what finds the end of a prompt that one text encoder does not see."""
    folder = model.parts / name
    file = folder / "tokenizer.json"
    if not file.exists():
        return functools.partial(_unread_by_transformers, model.tokenizers()[name])
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        msg = f"{file} cannot be read ({error}). Download or export the model again."
        raise ModelSourceError(msg) from error
    tokenizer.no_truncation()  # which a file may ask for, as it was last used
    tokenizer.no_padding()
    limit = read_json(folder / "tokenizer_config.json").get("model_max_length", sys.maxsize)
    return functools.partial(_unread, tokenizer, limit - _SPECIAL_TOKENS)


def _unread(tokenizer: Tokenizer, limit: int, prompt: str) -> str:
    places = tokenizer.encode(prompt, add_special_tokens=False).offsets
    return prompt[places[limit][0] :].strip() if len(places) > limit else ""


def _unread_by_transformers(tokenizer: Any, prompt: str) -> str:
    limit = tokenizer.model_max_length - _SPECIAL_TOKENS
    with quiet():
        tokens = tokenizer(prompt, add_special_tokens=False, truncation=False).input_ids
    end: str = tokenizer.decode(tokens[limit:]) if len(tokens) > limit else ""
    return end.strip()


_SPECIAL_TOKENS = 2
"""That stand around every prompt: its beginning and its end."""

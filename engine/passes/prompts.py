"""
Prompts on their way to the denoiser: what they say at each step, and what that becomes.

Each chunk of a prompt goes through the text encoder between a beginning and an end, and their
results stand one after the other. A weight multiplies the result z at its token's place, and the
chunk is scaled so that its mean is what it was, as in AUTOMATIC1111's web UI::

    z'(i) = w(i) z(i) * mean(z) / mean(w z)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.engine.compiling.faults import generation_errors
from holdfast.engine.errors import InvalidRequest
from holdfast.engine.graphs.text_encoder import REPLACED, VECTORS, skipped
from holdfast.engine.imports import quiet
from holdfast.engine.passes.one_pass import refuse_broken
from holdfast.engine.passes.reading import moments
from holdfast.engine.passes.whole_prompts import text_of
from holdfast.engine.prompts.embeddings import Embedding, split_at_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from holdfast.engine.models.model import Model
    from holdfast.engine.passes.one_pass import PassSpec
    from holdfast.engine.passes.reading import PromptReader
    from holdfast.engine.passes.views import View
    from holdfast.engine.passes.vocabulary import Vocabulary
    from holdfast.engine.prompts.chunks import Chunk
    from holdfast.engine.prompts.syntax import Span

    Rows = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Conditioning:
    """
    What the denoiser is told at each step of a pass.

    Attributes:
        positive: For each step the branches of the prompt: the share of each, and its rows.
        negative: For each step the negative prompt's rows; empty where guidance needs none.

    Rows are ``prompt_embeds`` (1, tokens, width), and ``pooled_prompt_embeds`` (1, width) where
    the family has them; of a family that reads prompts whole, whatever its pipeline takes.
    """

    positive: tuple[tuple[tuple[float, Rows], ...], ...]
    negative: tuple[Rows, ...]

    @property
    def changes(self) -> bool:
        """Whether it is more than one prompt with the same rows at every step."""
        single = all(len(step) == 1 for step in self.positive)
        return (
            not single
            or len({id(r) for s in self.positive for _, r in s}) > 1
            or (len({id(rows) for rows in self.negative}) > 1)
        )

    @property
    def first(self) -> dict[str, torch.Tensor]:
        """The first step's rows, by the pipeline's argument names."""
        rows = dict(self.positive[0][0][1])
        if self.negative:
            rows |= {f"negative_{name}": row for name, row in self.negative[0].items()}
        return rows


class Prompts:
    """
    Encodes prompts, and keeps the last few.

    Args:
        reader: Turns their texts into what a text encoder takes.
        limit: How many results of text encoders are kept.
    """

    def __init__(self, reader: PromptReader, limit: int = 64) -> None:
        self._reader = reader
        self._limit = limit
        self._known: dict[tuple[object, ...], Rows] = {}

    def encode(self, spec: PassSpec, view: View, model: Model) -> tuple[bool, Conditioning]:
        """
        Return whether a text encoder ran, and what the denoiser is told.

        Args:
            spec: Settled by the reader; says whether guidance needs the negative prompt.
            view: Its text encoders run, unless they have seen the same lately.
            model: Says how its text encoders are used.

        Raises:
            GenerationError: A text encoder failed.
        """
        before = set(self._known)
        reading, steps = spec.reading, moments(spec)
        positive = tuple(
            tuple(
                (branch.share, self._rows(branch.at(moment), spec, view, model))
                for branch in reading.prompt.branches
            )
            for moment in steps
        )
        negative = tuple(
            self._negative_rows(reading.negative.at(moment), spec, view, model)
            for moment in (steps if model.family.guides(spec.geometry) else ())
        )
        fresh = not before.issuperset(self._known)
        while len(self._known) > self._limit:
            del self._known[next(iter(self._known))]
        return fresh, Conditioning(positive, negative)

    def clear(self) -> None:
        """Forget them all."""
        self._known.clear()
        self._reader.clear()

    def _negative_rows(
        self, spans: tuple[Span, ...], spec: PassSpec, view: View, model: Model
    ) -> Rows:
        if model.family.reads_whole:
            return self._whole_rows(spans, view, model, negative=True)
        rows = self._rows(spans, spec, view, model)
        empty = not "".join(span.text or "" for span in spans)
        if not empty or not getattr(view.pipeline.config, "force_zeros_for_empty_prompt", False):
            return rows
        key = ("zeros", *(tuple(row.shape) for row in rows.values()))
        if key not in self._known:
            self._known[key] = {name: row * 0 for name, row in rows.items()}
        return self._known[key]

    def _whole_rows(
        self, spans: tuple[Span, ...], view: View, model: Model, *, negative: bool
    ) -> Rows:
        """Encode one prompt as the family's own pipeline does."""
        encoders = tuple(view.components[name].key for name in model.family.text_encoders)
        key = (encoders, model.folder.fingerprint, spans, negative)
        if key in self._known:
            self._known[key] = self._known.pop(key)
            return self._known[key]
        with generation_errors("encode the prompt"), quiet():
            rows = model.family.encode_prompt(view.pipeline, text_of(spans), negative=negative)
        tensors = [
            each for row in rows.values() for each in (row if isinstance(row, list) else [row])
        ]
        refuse_broken(tensors, view, model.family.text_encoders[-1])
        self._known[key] = rows
        return rows

    def _rows(self, spans: tuple[Span, ...], spec: PassSpec, view: View, model: Model) -> Rows:
        """Encode one prompt with every text encoder, padded to the length of the pass."""
        import torch

        if model.family.reads_whole:
            return self._whole_rows(spans, view, model, negative=False)
        names = model.family.text_encoders
        used = tuple(
            part.digest
            for span in spans
            for part in split_at_names(span.text or "", spec.reading.embeddings)
            if isinstance(part, Embedding)
        )
        encoders = tuple(view.components[name].key for name in names)
        key = (encoders, model.folder.fingerprint, spans, used, spec.chunks, spec.clip_skip)
        if key in self._known:
            self._known[key] = self._known.pop(key)
            return self._known[key]
        found = []
        for name in names:
            words = self._reader.words(model, name)
            chunks = self._reader.chunks(spans, spec.reading, model, name)
            missing = spec.chunks - len(chunks)
            found.append(_run(view, name, (*chunks, *[()] * missing), words, spec, model))
        rows = {"prompt_embeds": torch.cat([hidden for hidden, _ in found], -1)}
        pooled = found[-1][1]
        if pooled is not None:
            rows["pooled_prompt_embeds"] = pooled
        self._known[key] = rows
        return rows


def _run(  # noqa: PLR0917 - one call, of everything that a text encoder needs
    view: View,
    name: str,
    chunks: Sequence[Chunk],
    words: Vocabulary,
    spec: PassSpec,
    model: Model,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what one text encoder makes of chunks: (1, tokens, width), and the first's pooled."""
    import numpy as np
    import torch

    places, width = model.scale.tokens, model.text_width(name)
    ids = np.full((len(chunks), places), words.padding, np.int64)
    weights = np.ones((len(chunks), places), np.float32)
    vectors = np.zeros((len(chunks), places, width), np.float32)
    replaced = np.zeros((len(chunks), places), np.float32)
    for row, chunk in enumerate(chunks):
        ids[row, 0], place = words.start, 1
        for unit in chunk:
            here = slice(place, place + unit.length)
            ids[row, here], weights[row, here] = unit.token, unit.weight
            if unit.vectors is not None:
                vectors[row, here], replaced[row, here] = unit.vectors, 1
            place += unit.length
        ids[row, place] = words.end
    inputs = {"input_ids": ids} | ({VECTORS: vectors, REPLACED: replaced} if replaced.any() else {})
    with generation_errors("encode the prompt"), quiet():
        outputs = view.ports[name](inputs)
    hidden = torch.from_numpy(np.array(outputs[_layer(view, name, spec, model)]))
    refuse_broken([hidden], view, name)
    hidden = _weighted(hidden, torch.from_numpy(weights))
    pooled = None
    if "pooled_prompt_embeds" in model.family.prompt_outputs and name == _last(model):
        pooled = torch.from_numpy(np.array(outputs["text_embeds"])[:1])
    return hidden.reshape(1, -1, hidden.shape[-1]), pooled


def _last(model: Model) -> str:
    return model.family.text_encoders[-1]


def _layer(view: View, name: str, spec: PassSpec, model: Model) -> str:
    """Return the name of the output that the denoiser reads."""
    last = spec.clip_skip or model.family.text_layer
    names = {each for port in view.ports[name].outputs for each in port.get_names()}
    states = sum(each.startswith("hidden_states.") for each in names)
    if model.family.text_layer == 1:
        layer = "last_hidden_state" if last == 1 else skipped(last - 1)
    else:
        layer = f"hidden_states.{states - last}"
    if layer not in names:
        msg = (
            f"clip_skip={last} was asked for, but the {name} of this model has not as many layers "
            "that can be read. Ask for less."
        )
        raise InvalidRequest(msg)
    return layer


def _weighted(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weigh chunks (N, tokens, width) at each place, and keep the mean of each."""
    import torch

    if bool((weights == 1).all()):
        return hidden
    weighed = hidden * weights[..., None]
    before, after = (each.mean((1, 2), keepdim=True) for each in (hidden, weighed))
    # A mean that is nothing but rounding says nothing of a size.
    told = (before.abs() > _ROUNDING) & (after.abs() > _ROUNDING)
    return torch.where(told, weighed * before / after, weighed)


_ROUNDING = 1e-5

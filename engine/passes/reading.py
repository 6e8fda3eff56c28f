"""What the prompts of a pass say, before anything is compiled for it: LoRAs, length, losses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.passes.vocabulary import SPECIAL_TOKENS, vocabulary
from holdfast.engine.passes.whole_prompts import check_plain, unread
from holdfast.engine.prompts.chunks import Unit, in_chunks
from holdfast.engine.prompts.embeddings import EmbeddingLibrary, split_at_names, unknown_names
from holdfast.engine.prompts.syntax import SYNTAXES, Branch, Moment, Prompt, read_a1111
from holdfast.engine.prompts.tags import find_lora, read_tag
from holdfast.engine.requests.lora import Lora

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from holdfast.engine.models.model import Model
    from holdfast.engine.passes.one_pass import PassSpec
    from holdfast.engine.passes.vocabulary import Vocabulary
    from holdfast.engine.prompts.chunks import Chunk
    from holdfast.engine.prompts.embeddings import Embedding
    from holdfast.engine.prompts.syntax import Span
    from holdfast.engine.requests.config import EngineConfig


@dataclass(frozen=True)
class Reading:
    """
    What the prompts of a pass say.

    Attributes:
        prompt: To be drawn.
        negative: To be kept away from.
        embeddings: That they may call, by name in lower case.
    """

    prompt: Prompt
    negative: Branch
    embeddings: Mapping[str, Embedding]


NOTHING = Reading(Prompt((Branch(),)), Branch(), {})
"""What an empty prompt says."""


@dataclass(frozen=True)
class Loss:
    """
    A part of a prompt that would be lost.

    Attributes:
        kind: As `Degradation.kind`.
        prompt: The whole.
        words: What would be lost.
        advice: What to do, for an error.
        given: What becomes of the words instead.
    """

    kind: str
    prompt: str
    words: str
    advice: str
    given: str = "read as words"


class PromptReader:
    """Reads prompts; knows the words of tokenizers and the files of textual inversion."""

    def __init__(self) -> None:
        self._vocabularies: dict[tuple[str, str], Vocabulary] = {}
        self._embeddings = EmbeddingLibrary()

    def settle(self, spec: PassSpec, config: EngineConfig, model: Model) -> PassSpec:
        """
        Return a pass with what its prompts settle: the LoRAs of their tags, and their length.

        Raises:
            InvalidRequest: The prompt asks for what there is not, or what cannot be done.
            ModelSourceError: A tokenizer cannot be read.
        """
        read = SYNTAXES[config.prompt_syntax]
        prompt, negative = read(spec.prompt), read(spec.negative_prompt)
        branches = prompt.branches
        if (len(branches) > 1 or branches[0].share != 1) and not model.family.guides(spec.geometry):
            msg = (
                "AND composes pictures by guidance, but guidance is off for this pass. Ask for a "
                "guidance over 1 on a model that is guided, or leave out AND."
            )
            raise InvalidRequest(msg)
        reading = Reading(prompt, negative.whole, self._embeddings.find(config.embeddings))
        loras = spec.loras
        if prompt.tags:
            given = config.lora if loras is None else loras
            loras = (*given, *(_lora(tag, config, model) for tag in prompt.tags))
        settled = replace(spec, reading=reading, loras=loras)
        if model.family.reads_whole:
            check_plain(settled, moments(settled))
            return settled
        return replace(settled, chunks=self._count(settled, reading, model))

    def losses(
        self, passes: Sequence[PassSpec], config: EngineConfig, model: Model
    ) -> tuple[Loss, ...]:
        """Return what would have no effect of the prompts of some passes."""
        found: dict[tuple[str, str], Loss] = {}
        plain = config.prompt_syntax == "plain"
        for spec in passes:
            for prompt in (spec.prompt, spec.negative_prompt):
                end = unread(prompt, model) if model.family.reads_whole else ""
                if end:
                    advice = (
                        "The prompt is longer than the model's text encoder reads; it would not "
                        f"see the end: {end!r}. Shorten it, or open the engine with strict=False "
                        "to have it cut there."
                    )
                    found[prompt, end] = Loss("prompt_truncated", prompt, end, advice, "cut off")
                known = spec.reading.embeddings
                for name in unknown_names(prompt, known):
                    advice = (
                        f"{name} stands in the prompt, but the engine has no embedding of that "
                        f"name; it has {', '.join(known) or 'none'}. Open it with embeddings=, or "
                        "leave out 'embedding:' for the name to be read as words."
                    )
                    found[prompt, name] = Loss("embedding_unknown", prompt, name, advice)
            for prompt in (spec.negative_prompt, *([spec.prompt] if plain else [])):
                for tag in read_a1111(prompt).tags:
                    advice = (
                        f"{tag} adds no LoRA where it stands: tags are read in prompts that are "
                        "not negative, with prompt_syntax='a1111'. Put it there, or give the LoRA "
                        "as lora=."
                    )
                    found[prompt, tag] = Loss("tags_unused", prompt, tag, advice)
        return tuple(found.values())

    def words(self, model: Model, encoder: str) -> Vocabulary:
        """
        Return what a text encoder knows words by.

        Raises:
            ModelSourceError: The tokenizer cannot be read.
        """
        name = encoder.replace("text_encoder", "tokenizer")
        key = (model.folder.fingerprint, name)
        if key not in self._vocabularies:
            self._vocabularies[key] = vocabulary(model, name)
        return self._vocabularies[key]

    def chunks(
        self, spans: Sequence[Span], reading: Reading, model: Model, encoder: str
    ) -> tuple[Chunk, ...]:
        """
        Return what one text encoder is given of a prompt.

        Raises:
            InvalidRequest: An embedding was not made for it.
            ModelSourceError: The tokenizer cannot be read.
        """
        words = self.words(model, encoder)
        fitting = partial(_fitting, encoder=encoder, width=model.text_width(encoder))
        units = _units(spans, words, reading.embeddings, fitting)
        return in_chunks(units, model.scale.tokens - SPECIAL_TOKENS, words.comma)

    def clear(self) -> None:
        """Forget the tokenizers."""
        self._vocabularies.clear()

    def _count(self, spec: PassSpec, reading: Reading, model: Model) -> int:
        """Return how many chunks the longest prompt of a pass has."""
        said = {
            branch.at(moment)
            for moment in moments(spec)
            for branch in (*reading.prompt.branches, reading.negative)
        }
        return max(
            len(self.chunks(spans, reading, model, name))
            for name in model.family.text_encoders
            for spans in said
        )


def changes(spec: PassSpec) -> frozenset[int]:
    """Return the steps of a pass, from 0, whose prompts say something else than the one before."""
    branches = (*spec.reading.prompt.branches, spec.reading.negative)
    said = [[branch.at(moment) for branch in branches] for moment in moments(spec)]
    return frozenset(step for step in range(1, len(said)) if said[step] != said[step - 1])


def moments(spec: PassSpec) -> tuple[Moment, ...]:
    """Return the steps of a pass, as a prompt's schedule counts them."""
    passes = int(spec.steps_before > 0)
    return tuple(
        Moment(step, spec.steps, passes, spec.steps_before) for step in range(1, spec.steps + 1)
    )


def _lora(tag: str, config: EngineConfig, model: Model) -> Lora:
    found = read_tag(tag)
    path = find_lora(found.name, config.lora_dir)
    if found.text_encoder == found.denoiser:
        return Lora(path, found.denoiser)
    parts = {f"{name}.*": found.text_encoder for name in model.family.text_encoders}
    return Lora(path, blocks={**parts, f"{model.family.denoiser}.*": found.denoiser})


def _units(
    spans: Sequence[Span],
    words: Vocabulary,
    embeddings: Mapping[str, Embedding],
    fitting: Callable[[Embedding], NDArray[np.float32]],
) -> Iterator[Unit | None]:
    """Yield the tokens and vectors of a prompt."""
    for span in spans:
        if span.text is None:
            yield None
            continue
        for part in split_at_names(span.text, embeddings):
            if isinstance(part, str):
                yield from (Unit(token, span.weight) for token in words.ids(part))
            else:
                yield Unit(0, span.weight, fitting(part))


def _fitting(embedding: Embedding, encoder: str, width: int) -> NDArray[np.float32]:
    vectors = embedding.fitting(encoder, width)
    if vectors is None:
        widths = sorted({rows.shape[1] for rows in embedding.vectors.values()})
        msg = (
            f"The embedding {embedding.name} was made for text encoders of width "
            f"{' and '.join(map(str, widths))}, but this model has one of {width}. Use an "
            "embedding that was made for this kind of model."
        )
        raise InvalidRequest(msg)
    return vectors

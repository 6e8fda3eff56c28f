"""
What a denoiser need not compute again: what guidance adds, and what its deep levels give.

A whole evaluation answers for the negative prompt and the prompt, u and c. A cheap one runs the
prompt alone, and answers c - d for the negative prompt, with d = c - u of the last whole one. The
pipeline then guides by u + g (c - u) = c + (g - 1) d, without knowing. Where the graph has a part
that can be left out, see `feature_reuse`, it takes what that gave for the same prompt then: both
halves of its answer are equally old.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.engine.graphs.feature_reuse import FEATURES, FRESH, KEPT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from holdfast.engine.models.families import Guidance

    Inputs = Mapping[str, Any]
    Infer = Callable[[Inputs], Any]


class Reuse:
    """
    Runs the guided inferences of one call of a pipeline, and keeps what the next one reuses.

    It is made for each call, so that nothing goes from one pass, image or request into another.

    Args:
        cadence: Returns for each evaluation whether it is whole; asked at the first of them.
        guidance: How the denoiser is guided.
        images: How many go through it at once.
        apart: Its graph takes the batch of one prompt; two of them are two inferences.
    """

    def __init__(
        self,
        cadence: Callable[[], Sequence[bool]],
        guidance: Guidance,
        images: int,
        *,
        apart: bool,
    ) -> None:
        self._cadence = cadence
        self._guidance = guidance
        self._images = images
        self._apart = apart
        self._calls = 0
        self._inferences = 0
        self._reuses = False
        self._difference: NDArray[np.float32] | None = None
        self._drawn: Any = None
        self._features: list[NDArray[np.float32]] = []

    def __call__(self, infer: Infer, inputs: Inputs) -> Any:
        """Answer one call of the denoiser by its pipeline, which is guided."""
        if self._guidance.kind == "twice":
            return self._in_turn(infer, inputs)
        index, self._calls = self._calls, self._calls + 1
        prompt, other = self._halves()
        self._inferences = 0
        self._reuses = self._difference is not None and not self._whole[index]
        if not self._reuses:
            self._features.clear()
            outputs = self.both(infer, inputs)
            answer = outputs[0]
            self._difference = answer[prompt] - answer[other]
            return outputs
        outputs = infer(self._part(inputs, prompt) | self._kept(prompt))
        drawn = outputs[0]
        pair = [drawn - self._difference, drawn]
        return _with_answer(outputs, np.concatenate(pair if prompt.start else pair[::-1]))

    def both(self, infer: Infer, inputs: Inputs) -> Any:
        """Answer for two prompts, of whatever kind, in as many inferences as the graph needs."""
        if not self._apart:
            if self._reuses:
                return infer({**inputs, **self._kept(slice(None))})
            outputs = infer(inputs)
            if FEATURES in outputs:
                self._features.append(outputs[FEATURES])
            return outputs
        first, second = (
            infer(self._part(inputs, half))
            for half in (slice(0, self._images), slice(self._images, None))
        )
        return _with_answer(first, np.concatenate([first[0], second[0]]))

    def _kept(self, rows: slice) -> dict[str, Any]:
        """Return what stands in for the deep part in the next inference of this evaluation."""
        if not self._features:
            return {}
        features = self._features[self._inferences]
        self._inferences += 1
        return {FRESH: np.array(False), KEPT: np.ascontiguousarray(features[rows])}  # noqa: FBT003 - what NumPy takes

    @functools.cached_property
    def _whole(self) -> Sequence[bool]:
        return self._cadence()

    def _in_turn(self, infer: Infer, inputs: Inputs) -> Any:
        """Answer a pipeline that asks for the prompt first, and for the negative prompt then."""
        index, is_second = divmod(self._calls, 2)
        self._calls += 1
        if not is_second:
            self._drawn = infer(inputs)
            return self._drawn
        drawn = self._drawn[0]
        if self._whole[index] or self._difference is None:
            outputs = infer(inputs)
            self._difference = drawn - outputs[0]
            return outputs
        return _with_answer(self._drawn, drawn - self._difference)

    def _halves(self) -> tuple[slice, slice]:
        """Return which rows are the prompt's, and which the negative prompt's."""
        first, second = slice(0, self._images), slice(self._images, None)
        return (first, second) if self._guidance.prompt_first else (second, first)

    def _part(self, inputs: Inputs, rows: slice) -> dict[str, Any]:
        """Return some rows of each input that has a row for each prompt and image."""
        return {
            name: np.ascontiguousarray(np.asarray(value)[rows])
            if np.ndim(value) and len(value) == 2 * self._images
            else value
            for name, value in inputs.items()
        }


def _with_answer(outputs: Any, answer: NDArray[np.float32]) -> Any:
    """Return an inference's outputs with another first one."""
    values = dict(outputs.items())
    return type(outputs)({**values, next(iter(values)): answer})

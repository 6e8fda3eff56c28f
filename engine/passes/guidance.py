"""
What the denoiser is told at each step, and what is made of its answers.

The pipelines of diffusers know one prompt for all steps. Here, beneath them, each inference gets
the prompt of its step, and the answers to several prompts become one (Liu et al. 2022,
arXiv:2206.01714)::

    c = u + sum over i of w(i) (c(i) - u)

which the pipeline then guides by, u + g (c - u), without knowing that there were several.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.engine.compiling.keys import DYNAMIC
from holdfast.engine.passes.reading import changes
from holdfast.engine.passes.reuse import Reuse
from holdfast.engine.requests.cadence import cadence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from holdfast.engine.models.families import Family
    from holdfast.engine.passes.one_pass import PassSpec
    from holdfast.engine.passes.prompts import Conditioning, Rows
    from holdfast.engine.passes.views import View

    Inputs = Mapping[str, Any]
    Infer = Callable[[Inputs], Any]

_NAMES = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "text_embeds"}
"""Inputs of the denoiser by the pipeline's names of what they are given."""


def cadence_of(spec: PassSpec, family: Family, evaluations: int) -> tuple[bool, ...]:
    """Return for each of a pass's evaluations whether it is whole; see `cadence`."""
    if spec.speed == "exact" or not family.guides(spec.geometry):
        return (True,) * evaluations
    changed = {math.ceil(step * evaluations / spec.steps) for step in changes(spec)}
    return cadence(spec.speed, evaluations, spec.strength or 1.0, changed)


@contextlib.contextmanager
def guided(view: View, spec: PassSpec, told: Conditioning, images: int) -> Iterator[None]:
    """
    Let a view's denoiser be told what a pass says at each step, for as long as this is open.

    Its cheap evaluations are made here too.

    Args:
        view: Its pipeline is called inside, once.
        spec: The pass.
        told: What its prompts say.
        images: How many go through the denoiser at once.
    """
    port = view.ports[view.denoiser]
    changing = told.changes or bool(spec.guidance_rescale)
    reusing = spec.speed != "exact" and bool(told.negative)
    if not changing and not reusing:
        yield
        return
    family, key = view.model.family, view.components[view.denoiser].key
    reuse = Reuse(
        lambda: cadence_of(spec, family, view.pipeline.num_timesteps),
        family.guidance,
        images,
        apart=spec.geometry.apart and key.shape != DYNAMIC,
    )
    port.steer = _Guide(view, spec, told, images, reuse) if changing else reuse
    try:
        yield
    finally:
        port.steer = None


class _Guide:
    """Runs a denoiser's inferences for one call of its pipeline."""

    def __init__(
        self, view: View, spec: PassSpec, told: Conditioning, images: int, reuse: Reuse
    ) -> None:
        self._view = view
        self._spec = spec
        self._told = told
        self._images = images
        self._reuse = reuse
        self._calls = 0

    def __call__(self, infer: Infer, inputs: Inputs) -> Any:
        """Run one step's inferences, and return the one answer that the pipeline takes."""
        step = min(self._calls * self._spec.steps // self._view.pipeline.num_timesteps,
                   self._spec.steps - 1)  # fmt: skip
        self._calls += 1
        branches = self._told.positive[step]
        if not self._told.negative:
            return infer({**inputs, **self._rows(branches[0][1])})
        halves = [self._told.negative[step], *(rows for _, rows in branches)]
        outputs = self._reuse(infer, {**inputs, **self._pair(halves[0], halves[1])})
        answer: NDArray[np.float32] = outputs[0]
        without, *answers = np.split(answer, 2)
        rest = halves[2:]
        for first in range(0, len(rest), 2):
            pair = rest[first : first + 2]
            told = {**self._second_halves(inputs), **self._pair(pair[0], pair[-1])}
            answers += np.split(np.array(self._reuse.both(infer, told)[0]), 2)[: len(pair)]
        shares = [share for share, _ in branches]
        composed = without + sum(
            share * (each - without) for share, each in zip(shares, answers, strict=True)
        )
        answer[self._images :] = self._rescaled(without, composed)
        return outputs

    def _rescaled(
        self, without: NDArray[np.float32], answer: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """
        Return the answer that the pipeline's guidance makes the rescaled one of.

        Guidance raises the contrast; part of it is taken back (Lin et al. 2023, arXiv:2305.08891).
        """
        part, scale = self._spec.guidance_rescale, self._spec.guidance
        if not part:
            return answer
        axes = tuple(range(1, answer.ndim))
        guided_ = without + scale * (answer - without)
        wide = answer.std(axes, keepdims=True) / guided_.std(axes, keepdims=True)
        rescaled: NDArray[np.float32] = (part * wide + 1 - part) * guided_
        return without + (rescaled - without) / scale

    def _rows(self, rows: Rows) -> dict[str, Any]:
        return {
            _NAMES[name]: row.repeat_interleave(self._images, 0).numpy()
            for name, row in rows.items()
        }

    def _pair(self, first: Rows, second: Rows) -> dict[str, Any]:
        one, other = self._rows(first), self._rows(second)
        return {name: np.concatenate([one[name], other[name]]) for name in one}

    def _second_halves(self, inputs: Inputs) -> dict[str, Any]:
        """Return inputs of which both halves are those of what is drawn."""
        both = 2 * self._images
        return {
            name: np.concatenate([np.asarray(value)[self._images :]] * 2)
            if np.ndim(value) and len(value) == both
            else value
            for name, value in inputs.items()
        }

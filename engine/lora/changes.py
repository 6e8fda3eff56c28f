"""
What a LoRA file does to one weight: each kind of file is an equation.

``W`` is the model's weight, ``[out, in]`` or ``[out, in, height, width]``; every change is made on
it alone, so that the order of several does not matter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.engine.errors import LoraError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    Tensors = Mapping[str, np.ndarray]

# Up to so many multiplications OpenBLAS uses one thread. Thin products gain nothing from more, and
# lose much where the cores are busy; blocks of this size also stay in the processor's cache.
_ONE_THREAD = 2**18
_ROWS = 32


class Change(ABC):
    """What a file does to one linear or convolution weight."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the torch weight that it is for, output channels first, as far as it says."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a weight of this shape can be changed by it."""
        return shape[0] == self.shape[0] and math.prod(shape) == math.prod(self.shape)

    @abstractmethod
    def delta(self, weights: np.ndarray, weight: float) -> np.ndarray:
        """
        Return what is to be added to a weight.

        Args:
            weights: The model's, float32, output channels first; not changed.
            weight: How strongly the file works: 0 gives nothing, 1 what the trainer had.
        """


@dataclass(frozen=True, eq=False)
class LoraLayer(Change):
    """
    LoRA (Hu et al. 2021, arXiv:2106.09685): ``alpha / rank * up @ down``.

    Attributes:
        down: float32, ``[rank, in]`` or ``[rank, in, height, width]``.
        up: float32, ``[out, rank]`` or ``[out, rank, 1, 1]``.
        alpha: The delta is scaled by ``alpha / rank``.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - the base class says it
        return (self.up.shape[0], *self.down.shape[1:])

    def fits(self, shape: tuple[int, ...]) -> bool:
        """A linear layer and a 1x1 convolution are the same; trainers store either as the other."""
        return _without_ones(shape) == _without_ones(self.shape)

    def delta(self, weights: np.ndarray, weight: float) -> np.ndarray:  # noqa: D102 - the base class says it
        import numpy as np

        total = np.zeros_like(weights)
        self.add_to(total, weight)
        return total

    def add_to(self, weights: np.ndarray, weight: float) -> None:
        """
        Add ``weight * alpha / rank * up @ down`` to a torch weight, in place.

        Args:
            weights: float32 of :attr:`shape`; a convolution's must be contiguous.
            weight: How strongly the LoRA works.
        """
        rank = len(self.down)
        up = self.up.reshape(-1, rank) * (weight * self.alpha / rank)
        down = self.down.reshape(rank, -1)
        plain = weights.reshape(len(up), -1)
        width = max(1, _ONE_THREAD // (_ROWS * rank))
        for left in range(0, plain.shape[1], width):
            columns = slice(left, left + width)
            for top in range(0, len(up), _ROWS):
                rows = slice(top, top + _ROWS)
                plain[rows, columns] += up[rows] @ down[:, columns]


@dataclass(frozen=True, eq=False)
class Hadamard(Change):
    """
    LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098): ``scale * (a1 @ b1) * (a2 @ b2)``.

    Attributes:
        first: float32, ``[out, in]`` or ``[out, in, height, width]``: ``a1 @ b1``.
        second: The same of ``a2 @ b2``.
        scale: ``alpha / rank``.
    """

    first: tuple[np.ndarray, ...]
    second: tuple[np.ndarray, ...]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - the base class says it
        return _product_shape(*self.first)

    def delta(self, weights: np.ndarray, weight: float) -> np.ndarray:  # noqa: D102 - the base class says it
        both = _product(*self.first) * _product(*self.second)
        changed: np.ndarray = (weight * self.scale * both).reshape(weights.shape)
        return changed


@dataclass(frozen=True, eq=False)
class Kronecker(Change):
    """
    LoKr (Yeh et al. 2023, arXiv:2309.14859): ``scale * kron(w1, w2)``.

    Attributes:
        first: float32, ``[a, c]``, or factors that give it.
        second: float32, ``[b, d]`` or ``[b, d, height, width]``, or factors that give it.
        scale: ``alpha / rank``.
    """

    first: tuple[np.ndarray, ...]
    second: tuple[np.ndarray, ...]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - the base class says it
        (rows, columns), (height, width, *sides) = (
            _product_shape(*each) for each in (self.first, self.second)
        )
        return (rows * height, columns * width, *sides)

    def delta(self, weights: np.ndarray, weight: float) -> np.ndarray:  # noqa: D102 - the base class says it
        import numpy as np

        first, second = _product(*self.first), _product(*self.second)
        first = first.reshape(*first.shape, *(1,) * (second.ndim - 2))
        return np.kron(weight * self.scale * first, second).reshape(weights.shape)


@dataclass(frozen=True, eq=False)
class Whole(Change):
    """
    The difference itself, as trainers of whole layers store it.

    Attributes:
        difference: float32, of the weight's shape.
    """

    difference: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - the base class says it
        return self.difference.shape

    def delta(self, weights: np.ndarray, weight: float) -> np.ndarray:  # noqa: D102 - the base class says it
        return (weight * self.difference).reshape(weights.shape)


@dataclass(frozen=True, eq=False)
class Orthogonal(Change):
    """
    OFT (Qiu et al. 2023, arXiv:2306.07280): blocks of rows are turned, ``R @ W``.

    ``R = (I + Q) @ inverse(I - Q)`` of the skew ``Q = blocks - transposed blocks`` (Cayley). BOFT
    (Liu et al. 2023, arXiv:2311.06243) turns several times, and shuffles the rows in between as a
    fast Fourier transform does.

    Attributes:
        blocks: float32, ``[count, size, size]``; BOFT: ``[times, count, size, size]``.
        rescale: float32, ``[out, 1, ...]``: factors on the rows of ``R @ W``, or None.
        constraint: Bound on the norm of ``Q``, as a share of the rows; 0: none.
    """

    blocks: np.ndarray
    rescale: np.ndarray | None
    constraint: float

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - the base class says it
        return (self.blocks.shape[-3] * self.blocks.shape[-1],)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """It knows rows alone."""
        return shape[0] == self.shape[0]

    def delta(self, weights: np.ndarray, weight: float) -> np.ndarray:  # noqa: D102 - the base class says it
        import numpy as np

        skew = self.blocks - self.blocks.swapaxes(-1, -2)
        norm, bound = float(np.linalg.norm(skew)), self.constraint * self.shape[0]
        if self.constraint > 0 and norm > bound:
            skew = skew * (bound / norm)
        size = self.blocks.shape[-1]
        one = np.eye(size, dtype=np.float32)
        turns = (one + skew) @ np.linalg.inv(one - skew)
        turns = weight * turns + (1 - weight) * one
        rows = weights.reshape(len(weights), -1)
        turned = rows
        if self.blocks.ndim == _BUTTERFLY:
            for stage, turn in enumerate(turns):
                # Pairs of groups of rows that are 2**stage half blocks apart meet in one block.
                reach = 2**stage * (size // 2)
                met = turned.reshape(-1, 2, reach, rows.shape[1])
                kept = met.shape[0]
                met = turned.reshape(kept, 2, reach, -1).swapaxes(1, 2)
                met = turn @ met.reshape(-1, size, rows.shape[1])
                turned = met.reshape(kept, reach, 2, -1).swapaxes(1, 2).reshape(rows.shape)
        else:
            # The trainers' sum runs over the first axis of R: it is R transposed that turns.
            turned = turns.swapaxes(1, 2) @ rows.reshape(-1, size, rows.shape[1])
            turned = turned.reshape(rows.shape)
        if self.rescale is not None:
            factors = self.rescale.reshape(-1, 1)
            turned = (weight * (factors - 1) + 1) * turned
        changed: np.ndarray = (turned - rows).reshape(weights.shape)
        return changed


@dataclass(frozen=True, eq=False)
class Decomposed(Change):
    """
    DoRA (Liu et al. 2024, arXiv:2402.09353): ``magnitude * (W + delta) / norm(W + delta) - W``.

    Attributes:
        direction: What gives ``delta``.
        magnitude: float32, ``[out, 1, ...]``, or ``[1, in, 1, ...]`` where the norm is of columns.
    """

    direction: Change
    magnitude: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - the base class says it
        return self.direction.shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        """The direction must fit, and the magnitude one of the two first axes."""
        axis = self._axis
        return self.direction.fits(shape) and self.magnitude.size == shape[axis]

    @property
    def _axis(self) -> int:
        return int(self.magnitude.shape[0] == 1 and self.magnitude.ndim > 1)

    def delta(self, weights: np.ndarray, weight: float) -> np.ndarray:  # noqa: D102 - the base class says it
        import numpy as np

        moved = weights + self.direction.delta(weights, 1.0)
        others = tuple(axis for axis in range(moved.ndim) if axis != self._axis)
        norm = np.sqrt((moved**2).sum(axis=others, keepdims=True)) + np.finfo(np.float32).eps
        changed: np.ndarray = weight * (self.magnitude.reshape(norm.shape) * moved / norm - weights)
        return changed


_BUTTERFLY = 4

_HADA = {f"hada_w{side}_{part}" for side in "12" for part in "ab"}
_KINDS: Mapping[str, tuple[set[str], set[str]]] = {
    "LoRA": ({"down", "up"}, {"mid"}),
    "LoHa": (_HADA, {"hada_t1", "hada_t2"}),
    "LoKr": (
        set(),
        {"lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
    ),
    "OFT": ({"oft_blocks"}, {"rescale"}),
    "a difference of whole weights": ({"whole"}, set()),
}
_EVERY = {"alpha", "dora_scale", "magnitude"}


def change_of(tensors: Tensors, alpha: float | None) -> Change:
    """
    Make of a layer's tensors what they do to its weight.

    Args:
        tensors: float32 by role, see `names.layer_key`.
        alpha: Where the file says none itself; None: the rank.

    Raises:
        LoraError: Tensors are missing, are of two kinds, or do not fit each other. The text begins
            in the middle of a sentence: who knows file and layer puts them before.
    """
    roles = tensors.keys() - _EVERY
    kinds = [
        kind
        for kind, (needed, more) in _KINDS.items()
        if roles and needed <= roles <= needed | more
    ]
    if not kinds:
        names = ", ".join(sorted(tensors))
        raise LoraError(f"holds only {names}, which is no whole layer of any kind")
    given = tensors.get("alpha")
    if given is not None and given.size != 1:
        raise LoraError(f"has an alpha of {given.size} numbers, and not of one")
    alpha = alpha if given is None else float(given.reshape(()))
    try:
        change = _MAKERS[kinds[0]](tensors, alpha)
        return _decomposed(change, tensors)
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        shapes = ", ".join(f"{role} {value.shape}" for role, value in sorted(tensors.items()))
        raise LoraError(f"holds tensors that do not fit each other: {shapes}") from error


def _lora(tensors: Tensors, alpha: float | None) -> Change:
    import numpy as np

    down, up = tensors["down"], tensors["up"]
    rank = len(down)
    if up.shape[2:] not in {(), (1, 1)} or up.shape[1] != rank or not down.size:
        raise ValueError
    if "mid" in tensors:
        # Tucker: the core and one factor make the first matrix of a plain LoRA.
        core = tensors["mid"]
        down = np.einsum("mn...,nj->mj...", core, down.reshape(rank, -1))
    if down.ndim not in {2, 4}:
        raise ValueError
    return LoraLayer(np.ascontiguousarray(down), up, float(rank if alpha is None else alpha))


def _loha(tensors: Tensors, alpha: float | None) -> Change:
    parts = [
        tuple(
            tensors[role]
            for role in (f"hada_w{side}_a", f"hada_w{side}_b", f"hada_t{side}")
            if role in tensors
        )
        for side in "12"
    ]
    first, second = parts
    rank = len(tensors["hada_w1_b"])
    change = Hadamard(first, second, 1.0 if alpha is None else alpha / rank)
    if change.shape != _product_shape(*second):
        raise ValueError
    return change


def _lokr(tensors: Tensors, alpha: float | None) -> Change:
    parts = [
        (tensors[f"lokr_w{side}"],)
        if f"lokr_w{side}" in tensors
        else tuple(
            tensors[role]
            for role in (f"lokr_w{side}_a", f"lokr_w{side}_b", f"lokr_t{side}")
            if role in tensors or role.endswith(("a", "b"))
        )
        for side in "12"
    ]
    ranks = [len(part[1]) for part in parts if len(part) > 1]
    first, second = parts
    scale = alpha / ranks[0] if ranks and alpha is not None else 1.0
    change = Kronecker(first, second, scale)
    _ = change.shape
    return change


def _oft(tensors: Tensors, alpha: float | None) -> Change:
    blocks = tensors["oft_blocks"]
    if blocks.ndim not in {3, _BUTTERFLY} or blocks.shape[-1] != blocks.shape[-2]:
        raise ValueError
    change = Orthogonal(blocks, tensors.get("rescale"), alpha or 0.0)
    if change.rescale is not None and change.rescale.size != change.shape[0]:
        raise ValueError
    return change


def _whole(tensors: Tensors, _: float | None) -> Change:
    if tensors["whole"].ndim not in {2, 4}:
        raise ValueError
    return Whole(tensors["whole"])


_MAKERS = {
    "LoRA": _lora,
    "LoHa": _loha,
    "LoKr": _lokr,
    "OFT": _oft,
    "a difference of whole weights": _whole,
}


def _decomposed(change: Change, tensors: Tensors) -> Change:
    if "dora_scale" in tensors:
        if not tensors["dora_scale"].ndim:
            raise ValueError
        return Decomposed(change, tensors["dora_scale"])
    if "magnitude" in tensors:
        # PEFT's norm is of a row always, whatever axis of a convolution it is stored along.
        return Decomposed(change, tensors["magnitude"].reshape(-1))
    return change


def _product(*factors: np.ndarray) -> np.ndarray:
    """Return a matrix as it is, ``a @ b``, or ``a, b`` around a Tucker core."""
    import numpy as np

    match factors:
        case (matrix,):
            product = matrix
        case a, b:
            product = (a @ b.reshape(len(b), -1)).reshape(len(a), *b.shape[1:])
        case _:
            a, b, core = factors
            product = np.einsum("ij...,ip,jr->pr...", core, a, b)
    return product


def _product_shape(*factors: np.ndarray) -> tuple[int, ...]:
    """Return the shape of `_product`, and refuse factors that have none."""
    match [each.shape for each in factors]:
        case [(_, _) | (_, _, _, _) as shape]:
            return shape
        case [(rows, rank), (same, _) | (same, _, _, _) as right] if rank == same:
            return (rows, *right[1:])
        case [(rank, rows), (other, columns), (left, right, *sides)] if (rank, other) == (
            left,
            right,
        ):
            return (rows, columns, *sides)
    raise ValueError


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape

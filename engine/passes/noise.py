"""The noise that a pass starts from: its seed's, or one between two seeds, or of another size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class Variation(NamedTuple):
    """
    What is made of a seed's noise.

    Attributes:
        seed: Of the noise that it is turned towards.
        strength: How far, 0 to 1; 1 is all the way.
        resize: Width and height in latent pixels of the noise that is laid in the middle, in place
            of the pass's own; None: no other.
    """

    seed: int = 0
    strength: float = 0.0
    resize: tuple[int, int] | None = None

    @property
    def changes(self) -> bool:
        """Whether the noise is another than the seed's."""
        return self.strength > 0 or self.resize is not None

    def of(self, noise: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        """
        Return what noise becomes.

        Args:
            noise: (N, C, H, W), drawn with the seeds.
            seeds: One for each row.
        """
        import torch

        rows = []
        for index, seed in enumerate(seeds):
            row = noise[index : index + 1]
            inner = row
            if self.resize is not None:
                width, height = self.resize
                inner = _drawn(seed, (1, row.shape[1], height, width))
            if self.strength:
                inner = _between(inner, _drawn(self.seed, tuple(inner.shape)), self.strength)
            rows.append(inner if inner.shape == row.shape else _laid_into(row, inner))
        return torch.cat(rows)

    def apply_to(self, scheduler: Any, seeds: Sequence[int]) -> None:
        """Have a scheduler vary the noise that an img2img pipeline adds to its image."""
        add = scheduler.add_noise

        def add_varied(image: torch.Tensor, noise: torch.Tensor, timesteps: Any) -> torch.Tensor:
            varied: torch.Tensor = add(image, self.of(noise, seeds), timesteps)
            return varied

        scheduler.add_noise = add_varied


THE_SEEDS_OWN = Variation()
"""No variation."""


def _drawn(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def _between(low: torch.Tensor, high: torch.Tensor, part: float) -> torch.Tensor:
    """Turn one noise towards another, along each column, so that it keeps its size (slerp)."""
    import torch

    down = 2
    cosine = (
        low / low.norm(dim=down, keepdim=True) * high / high.norm(dim=down, keepdim=True)
    ).sum(down, keepdim=True)
    if cosine.mean() > _ALIKE:
        return low * (1 - part) + high * part
    angle = torch.acos(cosine.clamp(-1, 1))
    turned: torch.Tensor = (
        torch.sin((1 - part) * angle) * low + torch.sin(part * angle) * high
    ) / torch.sin(angle)
    return turned


def _laid_into(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Return `outer` with the middle of `inner` in its middle, as much as there is of both."""
    result = outer.clone()
    height, width = (min(outer.shape[axis], inner.shape[axis]) for axis in (2, 3))
    top, left = ((outer.shape[axis] - size) // 2 for axis, size in ((2, height), (3, width)))
    up, side = ((inner.shape[axis] - size) // 2 for axis, size in ((2, height), (3, width)))
    result[:, :, top : top + height, left : left + width] = inner[
        :, :, up : up + height, side : side + width
    ]
    return result


_ALIKE = 0.9995

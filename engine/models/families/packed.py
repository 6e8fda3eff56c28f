"""Families whose denoiser is handed patches: four latent pixels side by side in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.engine.models.families.family import Family

if TYPE_CHECKING:
    import torch

SIDE = 2
"""Of a patch, in latent pixels."""


class Packed(Family):
    """Packs latents (B, C, h, w) into (B, h / 2 x w / 2, C x 4)."""

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Lay patches out in rows."""
        batch, channels, height, width = latents.shape
        rows, columns = height // SIDE, width // SIDE
        patches = latents.reshape(batch, channels, rows, SIDE, columns, SIDE)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)

    def unpack(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Put patches back where they belong."""
        batch, places, _ = latents.shape
        rows, columns = grid(places, height, width)
        patches = latents.reshape(batch, rows, columns, -1, SIDE, SIDE)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * SIDE, columns * SIDE)

    def denoiser_shape(self, batch: int, channels: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of packed latents."""
        return (batch, (height // SIDE) * (width // SIDE), channels * SIDE**2)


def grid(places: int, height: int, width: int) -> tuple[int, int]:
    """Return how many rows and columns so many patches make in an image of this size."""
    side = round((height * width / places) ** 0.5)
    return height // side, width // side

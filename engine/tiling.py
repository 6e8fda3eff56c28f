"""
The VAE in overlapping tiles: a large image in the memory that a small one takes.

A VAE is not quite local: its group norms and the attention in its middle see the whole image, so
that a tile differs from the same place of a whole decode. `docs/performance.md` says by how much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

_LIVE_DECODE = 9.6
_LIVE_ENCODE = 4.6
"""Full-size feature maps of the VAE's first width that are in memory at once, as measured."""


def decode_bytes(width: int, height: int, vae_width: int, precision: str) -> int:
    """
    Return what activations take at most while an image is decoded whole, in bytes.

    Held against the rise of the largest resident set on CPU (OpenVINO 2026.4), from 256x256 to
    1024x1024 with the VAE of Stable Diffusion 1.5: within a tenth.

    Args:
        width: Pixels.
        height: Pixels.
        vae_width: Channels of the VAE at full size, the first of its ``block_out_channels``.
        precision: ``"f32"``, or one of the 16-bit ones.
    """
    return _activation_bytes(_LIVE_DECODE, width, height, vae_width, precision)


def encode_bytes(width: int, height: int, vae_width: int, precision: str) -> int:
    """Return the same for an image that is encoded whole."""
    return _activation_bytes(_LIVE_ENCODE, width, height, vae_width, precision)


def _activation_bytes(live: float, width: int, height: int, vae_width: int, precision: str) -> int:
    return round(live * width * height * vae_width * (4 if precision == "f32" else 2))


def decode_tiled(
    decode: Callable[[torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    *,
    factor: int,
    tile: int,
    overlap: int,
) -> torch.Tensor:
    """
    Decode latents tile by tile, blended by linear ramps where tiles overlap.

    All tiles have one shape, so that one static decoder serves them all.

    Args:
        decode: Turns latents (N, C, h, w) into pixels (N, 3, h * factor, w * factor).
        latents: (N, C, H, W).
        factor: Pixels on a latent pixel's side.
        tile: Side of a tile in latent pixels; a shorter side of `latents` is taken whole.
        overlap: Latent pixels that neighbours share at least; less than `tile`.

    Returns:
        Pixels (N, 3, H * factor, W * factor).
    """

    def run(row: int, column: int, height: int, width: int) -> torch.Tensor:
        part = latents[..., row : row + height, column : column + width]
        return decode(part.contiguous())

    return _blend(run, latents.shape[-2:], tile, overlap, factor)


def encode_tiled(
    encode: Callable[[torch.Tensor], torch.Tensor],
    pixels: torch.Tensor,
    *,
    factor: int,
    tile: int,
    overlap: int,
) -> torch.Tensor:
    """
    Encode pixels tile by tile, blended by linear ramps where tiles overlap.

    Args:
        encode: Turns pixels (N, 3, h, w) into latents, or into the moments of their distribution,
            (N, C, h / factor, w / factor).
        pixels: (N, 3, H, W); both sides are multiples of `factor`.
        factor: Pixels on a latent pixel's side.
        tile: Side of a tile in latent pixels; a shorter side of the image is taken whole.
        overlap: Latent pixels that neighbours share at least; less than `tile`.

    Returns:
        What `encode` returns, for the whole image: (N, C, H / factor, W / factor).
    """

    def run(row: int, column: int, height: int, width: int) -> torch.Tensor:
        top, bottom, left, right = (
            side * factor for side in (row, row + height, column, column + width)
        )
        return encode(pixels[..., top:bottom, left:right].contiguous())

    height, width = (side // factor for side in pixels.shape[-2:])
    return _blend(run, (height, width), tile, overlap, 1)


def _blend(
    run: Callable[[int, int, int, int], torch.Tensor],
    size: Sequence[int],
    tile: int,
    overlap: int,
    scale: int,
) -> torch.Tensor:
    """
    Sum weighted tiles and divide by the sum of their weights.

    Args:
        run: Computes the tile at (row, column) of (height, width), all in latent pixels.
        size: Height and width of the whole, in latent pixels.
        tile: See `decode_tiled`.
        overlap: The same.
        scale: Output pixels on a latent pixel's side.
    """
    import torch

    total = torch.zeros([side * scale for side in size])
    blended = None
    for row, height, row_weights in _tiles(size[0], tile, overlap, scale):
        for column, width, column_weights in _tiles(size[1], tile, overlap, scale):
            part = run(row, column, height, width)
            weights = row_weights[:, None] * column_weights
            if blended is None:
                blended = torch.zeros(*part.shape[:2], *total.shape)
            place = (
                ...,
                slice(row * scale, (row + height) * scale),
                slice(column * scale, (column + width) * scale),
            )
            blended[place] += part * weights
            total[place] += weights
    assert blended is not None  # noqa: S101 - there is at least one tile
    return blended / total


def _tiles(
    side: int, tile: int, overlap: int, scale: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """
    Spread as few tiles as it takes evenly over one side.

    Yields:
        Where a tile starts, its length, and the weights of its output along this side.
    """
    length = min(side, tile)
    gaps = 0 if side <= tile else -(-(side - tile) // (tile - overlap))
    for index in range(gaps + 1):
        rising = _ramp(length * scale, overlap * scale, rises=index > 0)
        falling = _ramp(length * scale, overlap * scale, rises=index < gaps).flip(0)
        yield round(index * (side - length) / max(gaps, 1)), length, rising * falling


def _ramp(length: int, overlap: int, *, rises: bool) -> torch.Tensor:
    """
    Return weights of 1, or such that rise to it over the middle half of the overlap.

    The outer quarter has no weight: there a tile lacks what lies beyond its rim.
    """
    import torch

    if not rises:
        return torch.ones(length)
    margin = overlap // 4
    return ((torch.arange(length) + 1 - margin) / (overlap - 2 * margin + 1)).clamp(0.0, 1.0)

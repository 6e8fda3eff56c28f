"""What holds of the VAE in tiles."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.engine.tiling import decode_tiled, encode_tiled

torch = pytest.importorskip("torch")

FACTOR = 8


def convolution(channels: int, *, size: int) -> torch.Tensor:
    """Return one fixed kernel, so that a result depends on `size` // 2 neighbours."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(channels, channels, size, size, generator=generator) / size


def local_decoder(latents: torch.Tensor) -> torch.Tensor:
    """Decode with convolutions alone: what a VAE is without its group norms and attention."""
    mixed = torch.nn.functional.conv2d(latents, convolution(4, size=3), padding=1)
    pixels = torch.nn.functional.interpolate(mixed[:, :3], scale_factor=FACTOR, mode="nearest")
    return torch.nn.functional.conv2d(pixels, convolution(3, size=5), padding=2)


def local_encoder(pixels: torch.Tensor) -> torch.Tensor:
    """Encode with convolutions alone."""
    mixed = torch.nn.functional.conv2d(pixels, convolution(3, size=5), padding=2)
    return torch.nn.functional.avg_pool2d(mixed, FACTOR)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), data=st.data())
def test_blended_tiles_of_a_pointwise_decoder_are_the_whole(
    height: int, width: int, data: st.DataObject
):
    """Whatever size, tile and overlap: what needs no neighbour comes out as from a whole decode."""
    tile = data.draw(st.integers(1, 40))
    overlap = data.draw(st.integers(0, tile - 1))
    latents = noise(2, 4, height, width)

    def pointwise(part: torch.Tensor) -> torch.Tensor:
        assert part.shape[-2:] == (min(height, tile), min(width, tile))
        return part[:, :3].repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)

    tiled = decode_tiled(pointwise, latents, factor=FACTOR, tile=tile, overlap=overlap)
    torch.testing.assert_close(tiled, pointwise_whole(latents))


def pointwise_whole(latents: torch.Tensor) -> torch.Tensor:
    return latents[:, :3].repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)


def test_tiles_all_have_one_shape():
    """A static decoder compiled for the tile serves the whole image."""
    shapes = set()

    def decode(part: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(part.shape))
        return local_decoder(part)

    decode_tiled(decode, noise(1, 4, 37, 50), factor=FACTOR, tile=16, overlap=4)
    assert shapes == {(1, 4, 16, 16)}


def test_tiles_of_a_local_decoder_are_the_whole():
    """A decoder that reaches no further than a quarter of the overlap leaves no difference."""
    latents = noise(1, 4, 48, 48)
    tiled = decode_tiled(local_decoder, latents, factor=FACTOR, tile=24, overlap=8)
    torch.testing.assert_close(tiled, local_decoder(latents))


def test_a_blend_has_no_seam():
    """Across a border of tiles that disagree by 1, neighbouring pixels differ by a ramp's step."""
    seen = iter(range(2))

    def disagreeing(part: torch.Tensor) -> torch.Tensor:
        return torch.full(
            (1, 3, part.shape[-2] * FACTOR, part.shape[-1] * FACTOR), float(next(seen))
        )

    blended = decode_tiled(disagreeing, noise(1, 4, 16, 24), factor=FACTOR, tile=16, overlap=8)
    steps = blended.diff(dim=-1)
    assert float(blended.min()) == 0.0
    assert float(blended.max()) == 1.0
    assert float(steps.min()) >= 0.0
    assert float(steps.max()) < 1 / (3 * FACTOR)


def test_tiles_of_a_local_encoder_are_the_whole():
    """The same for the way from pixels to latents."""
    pixels = noise(1, 3, 384, 256)
    tiled = encode_tiled(local_encoder, pixels, factor=FACTOR, tile=24, overlap=4)
    torch.testing.assert_close(tiled, local_encoder(pixels))

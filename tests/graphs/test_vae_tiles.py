"""What holds of the VAE in tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from holdfast.engine.graphs.vae_cut import cut
from holdfast.engine.graphs.vae_tiles import STRIDES, TILE, TiledVae, places
from tests.support.engines import NEEDS_BF16

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    Compile = Callable[[ov.Model, str], ov.CompiledModel]

SIDE = 96
"""Pixels on a tile's side here, so that small images take several."""


def picture(width: int, height: int) -> NDArray[np.float32]:
    """Return flat shapes (1, 3, height, width) in -1 to 1: unlike everywhere, as pictures are."""
    image = Image.new("RGB", (width, height), (40, 60, 200))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width * 0.1, height * 0.1, width * 0.5, height * 0.6), fill=(230, 30, 30))
    draw.rectangle((width * 0.6, height * 0.5, width * 0.9, height * 0.9), fill=(250, 240, 60))
    return (np.asarray(image, np.float32) / 127.5 - 1).transpose(2, 0, 1)[None].copy()


def levels(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return (pixels.clip(-1, 1) + 1) * 127.5


class Vae:
    """The tiny model's encoder and decoder, whole and in tiles."""

    def __init__(self, folder: Path, stride: int, precision: str = "f32") -> None:
        self.stride = stride
        core = ov.Core()
        properties = {"INFERENCE_PRECISION_HINT": precision}
        graphs = {
            name: core.read_model(folder / f"vae_{name}" / "openvino_model.xml")
            for name in ("encoder", "decoder")
        }
        self.whole = {
            name: core.compile_model(graph, "CPU", properties) for name, graph in graphs.items()
        }
        self.cut = {
            name: core.compile_model(cut(graph, stride), "CPU", properties)
            for name, graph in graphs.items()
        }
        self.tiled = {name: TiledVae(compiled, stride, SIDE) for name, compiled in self.cut.items()}

    def latents(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the means (1, 4, h, w) of an image's latents."""
        means: NDArray[np.float32] = self.whole["encoder"](pixels)[0][:, :4]
        return means.copy()


@pytest.fixture(scope="module", params=STRIDES.values(), ids=STRIDES)
def vae(tiny_ir: Path, request: pytest.FixtureRequest) -> Vae:
    return Vae(tiny_ir, request.param)


@pytest.mark.parametrize("size", [(320, 320), (416, 192), (96, 272), (64, 64)])
def test_a_decode_in_tiles_is_that_of_the_whole(vae: Vae, size: tuple[int, int]) -> None:
    """In float32 no pixel differs by more than 2/255, whatever the size."""
    latents = vae.latents(picture(*size))
    whole = levels(vae.whole["decoder"](latents)[0])
    tiled = levels(vae.tiled["decoder"].decode(latents))
    assert tiled.shape == whole.shape
    assert whole.std() > 10
    assert vae.tiled["decoder"].exact
    assert np.abs(tiled - whole).max() < 2


@pytest.mark.parametrize("size", [(320, 320), (416, 192), (96, 272), (64, 64)])
def test_an_encode_in_tiles_is_that_of_the_whole(vae: Vae, size: tuple[int, int]) -> None:
    """In float32 latents differ by less than a hundredth of their own deviation."""
    pixels = picture(*size)
    whole = vae.whole["encoder"](pixels)[0]
    tiled = vae.tiled["encoder"].encode(pixels)
    assert tiled.shape == whole.shape
    assert vae.tiled["encoder"].exact
    assert np.abs(tiled - whole).max() < whole[:, :4].std() / 100


@NEEDS_BF16
def test_rounding_is_all_that_16_bits_add(tiny_ir: Path, vae: Vae) -> None:
    """In bf16, tiles are as near to the float32 image as a whole decode in bf16 is."""
    latents = vae.latents(picture(320, 256))
    exact = levels(vae.whole["decoder"](latents)[0])
    halved = Vae(tiny_ir, vae.stride, "bf16")
    whole = np.abs(levels(halved.whole["decoder"](latents)[0]) - exact)
    tiled = np.abs(levels(halved.tiled["decoder"].decode(latents)) - exact)
    assert tiled.mean() < 2 * whole.mean() + 0.1
    assert tiled.max() < 2 * whole.max() + 2


def test_tiles_that_measure_themselves_would_show(vae: Vae) -> None:
    """Statistics of each tile's own, in place of the whole image's, are off by far more."""
    latents = vae.latents(picture(320, 320))
    whole = levels(vae.whole["decoder"](latents)[0])
    apart = levels(vae.whole["decoder"](latents[..., :20, :20].copy())[0])
    assert np.abs(apart - whole[..., :160, :160])[..., :128, :128].max() > 4


class Recorder:
    """A compiled model that keeps the shapes it was given."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self.compiled = compiled
        self.shapes: list[tuple[int, ...]] = []

    def input(self, name: str) -> Any:
        return self.compiled.input(name)

    def release_memory(self) -> None:
        self.compiled.release_memory()

    def __call__(self, inputs: dict[str, Any]) -> Any:
        self.shapes.append(inputs[TILE].shape)
        return self.compiled(inputs)


def test_no_tile_is_larger_than_told(vae: Vae) -> None:
    """However large the image: what runs at once is a tile, or an image shrunk to 256x256."""
    recorder = Recorder(vae.cut["decoder"])
    TiledVae(recorder, vae.stride, SIDE).decode(vae.latents(picture(640, 512)))
    assert max(side for shape in recorder.shapes for side in shape[-2:]) <= 256 // vae.stride


@given(
    grains=st.integers(1, 80),
    side=st.integers(1, 20),
    reach=st.integers(0, 5),
    grain=st.integers(1, 4),
)
def test_tiles_share_a_side_out(grains: int, side: int, reach: int, grain: int) -> None:
    """Own parts cover it once; each tile shows what it reaches, or the rim; all have one size."""
    length = grains * grain
    tiles = list(places(length, side * grain, reach * grain, grain))
    assert [each.own_start for each in tiles] == [0, *(each.own_stop for each in tiles[:-1])]
    assert tiles[-1].own_stop == length
    assert len({each.stop - each.start for each in tiles}) == 1
    for each in tiles:
        assert each.start % grain == 0
        assert each.own <= side * grain
        assert each.start == 0 or each.own_start - each.start >= reach * grain
        assert each.stop == length or each.stop - each.own_stop >= reach * grain


def test_a_graph_that_keeps_its_size_is_refused() -> None:
    """Where there is nothing between latents and pixels there is nothing to cut."""
    parameter = ov.opset13.parameter([1, 4, -1, -1], ov.Type.f32)
    graph = ov.Model([ov.opset13.relu(parameter)], [parameter])
    with pytest.raises(ValueError, match="cannot be cut"):
        cut(graph, 4)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_halves_keep_what_the_export_asks_of_a_compile(tiny_ir: Path, name: str) -> None:
    """A scale of activations, as SDXL's and Flux's exports have one, is the cut graph's too."""
    graph = ov.Core().read_model(tiny_ir / f"vae_{name}" / "openvino_model.xml")
    place = ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"]
    assert cut(graph, 2).has_rt_info(place) == graph.has_rt_info(place)
    graph.set_rt_info("128.0", place)
    assert cut(graph, 2).get_rt_info(place).value == "128.0"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from holdfast.engine import Hires, Img2Img, Txt2Img
from holdfast.engine.errors import InvalidRequest
from holdfast.engine.passes.noise import Variation

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

    from holdfast.engine import Engine


def drawn(seed: int, width: int = 12, height: int = 10) -> torch.Tensor:
    """Return a seed's noise."""
    return torch.randn((1, 4, height, width), generator=torch.Generator().manual_seed(seed))


def test_noise_turns_towards_another_seeds() -> None:
    """Half way lies between both, keeps its size, and all the way is the other's."""
    low, high = drawn(1), drawn(2)
    half = Variation(2, 0.5).of(low, [1])
    for one, other in ((half, low), (half, high)):
        assert 0.5 < torch.nn.functional.cosine_similarity(one, other, dim=2).mean() < 0.9
    assert half.std() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(Variation(2, 1.0).of(low, [1]), high)
    torch.testing.assert_close(Variation(1, 0.5).of(low, [1]), low)


def test_each_column_is_turned_in_its_own_plane() -> None:
    """The equation is that of spherical interpolation, for each column of each channel."""
    low, high = drawn(1).double(), drawn(2).double()
    varied = Variation(2, 0.3).of(drawn(1), [1])
    for channel, column in ((0, 0), (3, 7)):
        a, b = low[0, channel, :, column].numpy(), high[0, channel, :, column].numpy()
        angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        wanted = (np.sin(0.7 * angle) * a + np.sin(0.3 * angle) * b) / np.sin(angle)
        np.testing.assert_allclose(varied[0, channel, :, column], wanted, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 4), (20, 30), (6, 30), (12, 10)])
def test_noise_of_another_size_lies_in_the_middle(size: tuple[int, int]) -> None:
    """Smaller noise is laid into the pass's own; of larger noise the middle is taken."""
    width, height = size
    result = Variation(resize=size).of(drawn(1), [1])
    inner = drawn(1, width, height)
    rows, columns = min(height, 10), min(width, 12)
    middle = [slice((full - part) // 2, (full - part) // 2 + part) for full, part in
              ((10, rows), (12, columns), (height, rows), (width, columns))]  # fmt: skip
    assert torch.equal(result[:, :, middle[0], middle[1]], inner[:, :, middle[2], middle[3]])
    outside = torch.ones(10, 12, dtype=torch.bool)
    outside[middle[0], middle[1]] = False
    assert torch.equal(result[0, :, outside], drawn(1)[0, :, outside])


@pytest.fixture(scope="module")
def fields() -> dict[str, Any]:
    return {"prompt": "a dog", "steps": 2, "width": 64, "height": 64, "scheduler": "euler"}


def near(image: Image.Image, other: Image.Image) -> bool:
    difference = np.asarray(image, np.float32) - np.asarray(other, np.float32)
    return float(np.abs(difference).mean()) < 1


def test_a_whole_variation_is_the_other_seeds_picture(
    open_engine: Callable[..., Engine], fields: dict[str, Any]
) -> None:
    """In txt2img, img2img and both passes of a hires run; with less it lies apart from both."""
    engine = open_engine(precision="f32")
    picture = engine.run(Txt2Img(**fields, seed=9)).images[0]
    for kind, more in (
        (Txt2Img, {}),
        (Hires, {"scale": 1.5, "upscaler": "latent"}),
    ):
        one, other = (engine.run(kind(**fields, **more, seed=seed)).images[0] for seed in (1, 2))
        for strength in (1.0, 0.4):
            varied = kind(**fields, **more, seed=1, variation_seed=2, variation_strength=strength)
            image = engine.run(varied).images[0]
            assert near(image, other) == (strength == 1)
            assert not near(image, one)
    request = Img2Img(image=picture, prompt="a dog", steps=2, strength=0.5, seed=1)
    varied = request.but(variation_seed=2, variation_strength=1.0)
    plain, moved = (engine.run(each).images[0] for each in (request, varied))
    assert not near(moved, plain)


def test_an_image_of_a_varied_batch_is_made_alone(
    open_engine: Callable[..., Engine], fields: dict[str, Any]
) -> None:
    """Image i of a batch is that of its own seed, to the bit."""
    engine = open_engine()
    request = Txt2Img(
        **fields, seed=3, batch=2, variation_seed=8, variation_strength=0.3, seed_resize=(32, 48)
    )
    batch = engine.run(request)
    assert "Variation seed: 8, Variation seed strength: 0.3" in batch.infotext
    assert "Seed resize from: 32x48" in batch.infotext
    alone = engine.run(request.but(seed=batch.seeds[1], batch=1)).images[0]
    assert alone.tobytes() == batch.images[1].tobytes()


@pytest.mark.parametrize("given", [{"variation_seed": 3}, {"variation_strength": 0.5}])
def test_a_variation_needs_both_of_its_fields(given: dict[str, Any]) -> None:
    """A strength without a seed, or a seed without a strength, says what is missing."""
    with pytest.raises(InvalidRequest, match="give variation_seed and a variation_strength"):
        Txt2Img(prompt="a", **given)

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.engine.compiling.keys import DYNAMIC, ComponentKey, Setup, keys_for
from holdfast.engine.lora import LoraUse
from holdfast.engine.models.families import FAMILIES, Geometry, Scale
from holdfast.states import Mode

SD = FAMILIES["StableDiffusionPipeline"]
LCM = FAMILIES["LatentConsistencyModelPipeline"]
NAMES = SD.all_components
SCALE = Scale(
    factor=8, channels=4, multiple=64, default=(512, 512), denoiser_width=320,
    vae_widths=(128, 256, 512, 512),
)  # fmt: skip
SIZE = Geometry(512, 512)
INK = LoraUse("ink", "d1", 0.8, frozenset({"unet"}))
CHALK = LoraUse("chalk", "d2", -0.5, frozenset({"unet", "text_encoder"}))
SETUP = Setup(
    sources={name: f"source of {name}" for name in NAMES},
    devices=dict.fromkeys(NAMES, "CPU"),
    properties=dict.fromkeys(NAMES, (("INFERENCE_PRECISION_HINT", "f32"),)),
    openvino="2026.4",
)
STATIC = replace(SETUP, static=True)
KEY = ComponentKey("unet", "s", (INK,), "none", "2x4x64x64", "CPU", (("A", "1"),), "2026.4")
OTHER: dict[str, Any] = {
    "component": "vae_decoder",
    "source": "t",
    "lora": (replace(INK, weight=0.7),),
    "quantization": "int8",
    "tokens": 154,
    "shape": DYNAMIC,
    "device": "GPU",
    "properties": (("A", "2"),),
    "openvino": "2026.5",
}


def differing(
    before: Setup, after: Setup, there: Geometry = SIZE, then: Geometry = SIZE
) -> set[str]:
    """Name the components of img2img whose key is another one."""
    old = keys_for(SD, before, Mode.IMG2IMG, there, SCALE)
    new = keys_for(SD, after, Mode.IMG2IMG, then, SCALE)
    return {name for name in NAMES if old[name] != new[name]}


# What is in a key ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [each.name for each in fields(ComponentKey)])
def test_every_field_is_part_of_the_identity(name: str) -> None:
    """Two keys that differ in one field are different, and so are their digests."""
    other = replace(KEY, **{name: OTHER[name]})
    assert other != KEY
    assert other.digest != KEY.digest


def test_a_digest_is_that_of_the_content_alone() -> None:
    """Equal keys have equal digests, also in another process: it depends on no hash seed."""
    assert replace(KEY).digest == KEY.digest == "8e9aa4e494ce8df7"


@given(st.text(), st.text())
def test_no_two_texts_run_together(left: str, right: str) -> None:
    """What stands at the end of one field is never taken for the beginning of the next."""
    moved = replace(KEY, component=left + right, source="")
    kept = replace(KEY, component=left, source=right)
    assert (moved.digest == kept.digest) == (moved == kept)


def test_a_renamed_lora_is_the_same() -> None:
    """A LoRA is what its file holds: under another name it gives an equal key."""
    renamed = replace(KEY, lora=(replace(INK, name="copy of ink"),))
    assert renamed == KEY
    assert renamed.digest == KEY.digest
    assert not renamed.changes_from(KEY)


@given(st.floats(-10, 10), st.floats(-10, 10))
def test_any_other_weight_is_another_key(first: float, second: float) -> None:
    """Two weights of one LoRA give two keys, however close they are."""
    keys = [replace(KEY, lora=(replace(INK, weight=weight),)) for weight in (first, second)]
    assert (keys[0] == keys[1]) == (first == second)
    if first and second:
        assert (keys[0].digest == keys[1].digest) == (first == second)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": "2x4x96x96"}, ("shape: 2x4x64x64 -> 2x4x96x96",)),
        ({"lora": ()}, ("lora: ink@0.8 -> none",)),
        ({"lora": (INK, CHALK)}, ("lora: ink@0.8 -> ink@0.8+chalk@-0.5",)),
        ({"properties": (("A", "1"), ("B", "x"))}, ("properties: A=1 -> A=1+B=x",)),
        (
            {"device": "GPU", "source": "t"},
            ("source: s -> t", "device: CPU -> GPU"),
        ),
        ({}, ()),
    ],
)
def test_a_change_is_told_field_by_field(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    """What differs between two keys is told as ``field: old -> new``, and nothing else is."""
    assert replace(KEY, **changes).changes_from(KEY) == words


# Which keys a change touches ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "there", "then", "touched"),
    [
        pytest.param(SETUP, SETUP, SIZE, Geometry(768, 512), set(), id="a size, dynamic"),
        pytest.param(
            STATIC, STATIC, SIZE, Geometry(768, 512), {"unet", "vae_decoder", "vae_encoder"},
            id="a size, static",
        ),
        pytest.param(
            STATIC, STATIC, SIZE, Geometry(512, 512, guidance=1.0), {"unet"}, id="guidance, static"
        ),
        pytest.param(
            SETUP, SETUP, SIZE, Geometry(512, 512, guidance=1.0), set(), id="guidance, dynamic"
        ),
        pytest.param(
            STATIC, STATIC, SIZE, Geometry(512, 512, chunks=2), {"unet"}, id="a long prompt, static"
        ),
        pytest.param(
            SETUP, SETUP, SIZE, Geometry(512, 512, chunks=2), set(), id="a long prompt, dynamic"
        ),
        pytest.param(
            STATIC, STATIC, SIZE, Geometry(512, 512, images=3), {"unet"}, id="a batch, static"
        ),
        pytest.param(
            SETUP, replace(SETUP, sources=SETUP.sources | dict.fromkeys(NAMES[2:], "x")),
            SIZE, SIZE, {"vae_decoder", "vae_encoder"}, id="another VAE",
        ),
        pytest.param(SETUP, SETUP.with_loras((INK,)), SIZE, SIZE, {"unet"}, id="a LoRA"),
        pytest.param(
            SETUP, SETUP.with_loras((CHALK,)), SIZE, SIZE, {"unet", "text_encoder"},
            id="a LoRA with a text encoder",
        ),
        pytest.param(
            SETUP, SETUP.with_loras((replace(CHALK, weight=0.0),)), SIZE, SIZE, set(),
            id="a LoRA of weight 0",
        ),
        pytest.param(
            SETUP, replace(SETUP, quantization="int8"), SIZE, SIZE, {"unet"}, id="quantization"
        ),
        pytest.param(
            SETUP, replace(SETUP, devices={**SETUP.devices, "unet": "GPU"}), SIZE, SIZE, {"unet"},
            id="one device",
        ),
        pytest.param(
            SETUP, replace(SETUP, openvino="2026.5"), SIZE, SIZE, set(NAMES), id="OpenVINO"
        ),
        pytest.param(
            SETUP, replace(STATIC), SIZE, SIZE, {"unet", "vae_decoder", "vae_encoder"}, id="shapes"
        ),
    ],
)  # fmt: skip
def test_a_change_touches_the_keys_of_what_depends_on_it(
    before: Setup, after: Setup, there: Geometry, then: Geometry, touched: set[str]
) -> None:
    """A change gives new keys to exactly the components that compile to something else by it."""
    assert differing(before, after, there, then) == touched


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.booleans(), st.sampled_from(Mode)
)
def test_no_size_is_in_a_text_encoders_key(
    width: int,
    height: int,
    images: int,
    guided: bool,  # noqa: FBT001 - hypothesis gives it
    mode: Mode,
) -> None:
    """Whatever the size, the batch, the guidance and the mode: a text encoder's key is one."""
    geometry = Geometry(width * 64, height * 64, images, 7.0 if guided else 1.0)
    keys = keys_for(SD, STATIC, mode, geometry, SCALE)
    assert keys["text_encoder"] == keys_for(SD, SETUP, Mode.TXT2IMG, SIZE, SCALE)["text_encoder"]
    assert keys["unet"].shape == f"{images * (1 + guided)}x4x{height * 8}x{width * 8}"
    assert keys["vae_decoder"].shape == f"1x4x{height * 8}x{width * 8}"


def test_img2img_adds_the_encoder_and_shares_the_rest() -> None:
    """txt2img and img2img of one geometry have the same keys, but for the VAE encoder."""
    first, second = (
        keys_for(SD, STATIC, mode, SIZE, SCALE) for mode in (Mode.TXT2IMG, Mode.IMG2IMG)
    )
    assert second.keys() - first.keys() == {"vae_encoder"}
    assert all(second[name] == key for name, key in first.items())
    assert second["vae_encoder"].shape == "1x3x512x512"


def test_guidance_by_embedding_never_doubles_the_batch() -> None:
    """A latent consistency model takes guidance as an input: its batch is that of the images."""
    shapes = {
        keys_for(LCM, STATIC, Mode.TXT2IMG, replace(SIZE, guidance=guidance), SCALE)["unet"].shape
        for guidance in (1.0, 7.0)
    }
    assert shapes == {"1x4x64x64"}

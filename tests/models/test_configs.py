"""Whatever stands in a model's configurations, headers and paths is read, or is one error."""

from __future__ import annotations

import contextlib
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.engine.errors import HoldfastError, ModelSourceError
from holdfast.engine.models.configs import (
    Config,
    Scheduler,
    TextEncoder,
    Tokenizer,
    UNet,
    Vae,
    as_config,
    read_config,
    read_index,
    read_vae,
)
from holdfast.engine.models.families import FAMILIES, family_of
from holdfast.engine.models.integrity import read_header
from holdfast.engine.models.model import Latents
from holdfast.engine.models.source import resolve
from tests.conftest import ignore

if TYPE_CHECKING:
    from pathlib import Path

KINDS = (Config, Scheduler, TextEncoder, Tokenizer, UNet, Vae)
NAMES = sorted({"_class_name", *(name for kind in KINDS for name in kind.__struct_fields__)})
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, -1, 4, 10**30, 1e308, "AutoencoderKL", "epsilon"])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
CONFIGS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs") / "config.json"


@given(content=CONFIGS)
def test_a_configuration_is_read_or_refused(file: Path, content: dict[str, Any]) -> None:
    """Fields of any type and size give usable numbers, or an error that names the file."""
    file.write_text(json.dumps(content))
    for kind in KINDS:
        try:
            config = read_config(file, kind)
        except ModelSourceError as error:
            assert str(file) in str(error)  # noqa: PT017 - both ends are allowed
            continue
        numbers = [v for v in map(config.__getattribute__, kind.__struct_fields__) if v is not None]
        assert not any(isinstance(each, float) and not math.isfinite(each) for each in numbers)
        if isinstance(config, UNet):
            assert family_of("StableDiffusionPipeline").scale(config, Vae()).multiple > 0
    for read in (read_vae, read_index):
        with contextlib.suppress(ModelSourceError):
            read(file)


@given(text=st.binary(max_size=64) | CONFIGS.map(lambda each: json.dumps(each).encode()))
def test_bytes_that_are_no_configuration_are_refused(file: Path, text: bytes) -> None:
    """What is not a JSON object is an error of Holdfast's own."""
    file.write_bytes(text)
    for read in (read_vae, read_index, lambda path: read_config(path, UNet)):
        with contextlib.suppress(ModelSourceError):
            read(file)


def test_deep_json_is_refused(file: Path) -> None:
    """A file of nothing but brackets does not break the reader."""
    file.write_text("[" * 100_000)
    with pytest.raises(ModelSourceError, match="cannot be read as JSON"):
        read_config(file, UNet)


ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": LEAVES,
        "shape": st.lists(st.integers(), max_size=3) | LEAVES,
        "data_offsets": st.lists(st.integers(), max_size=3) | LEAVES,
    },
)


@given(
    header=st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), ENTRIES | LEAVES)
    | st.binary(max_size=40),
    claimed=st.none() | st.integers(0, 2**64 - 1),
)
def test_a_header_is_read_or_refused(file: Path, header: Any, claimed: int | None) -> None:
    """A header that lies about itself or its length is an error that names the file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if claimed is None else claimed
    file.write_bytes(size.to_bytes(8, "little") + text)
    with contextlib.suppress(ModelSourceError):
        read_header(file)


@settings(max_examples=50)
@given(
    name=st.text(st.characters(), max_size=30)
    | st.sampled_from(["~nobody-here/x", "\0", "a" * 5000])
)
def test_no_path_breaks_resolving(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Null bytes, unknown users, half characters and overlong names are Holdfast's own errors."""
    place = tmp_path_factory.getbasetemp() / "paths"
    for role in ("model", "vae"):
        with contextlib.suppress(HoldfastError):
            resolve(f"./no-such-folder-{name}", place, ignore, role=role)
        with contextlib.suppress(HoldfastError):
            resolve(f"~no-such-user{name}", place, ignore, role=role)


def test_what_is_absent_is_as_in_diffusers() -> None:
    """Every default is the one of the class that the configuration is of."""
    from holdfast.engine.imports import heavy

    heavy()
    import inspect

    import diffusers

    for kind, theirs in ((UNet, diffusers.UNet2DConditionModel), (Vae, diffusers.AutoencoderKL)):
        signature = inspect.signature(theirs.__init__).parameters
        for name in set(kind.__struct_fields__) - {"class_name"}:
            default = getattr(kind(), name)
            assert default == signature[name].default, name


@pytest.mark.parametrize("value", [None, [16, 24], 32, "absent"])
def test_the_size_of_the_training_is_optional(file: Path, value: Any) -> None:
    """A side, a pair of height and width, null and nothing at all each give a size."""
    content = {} if value == "absent" else {"sample_size": value}
    row = family_of("StableDiffusionXLPipeline")
    vae = Vae(block_out_channels=(8, 8, 8, 8))
    sides = {None: (1024, 1024), "absent": (1024, 1024), 32: (256, 256)}
    expected = (192, 128) if isinstance(value, list) else sides[value]
    assert row.scale(as_config(content, file, UNet), vae).default == expected


@pytest.mark.parametrize(
    "name", [name for name, row in FAMILIES.items() if row.denoiser_config is UNet]
)
def test_guidance_by_embedding_is_a_fact_of_the_denoiser(name: str) -> None:
    """A denoiser that is told the guidance is never given two rows for an image."""
    row = family_of(name)
    told = row.fitted(UNet(time_cond_proj_dim=256), Vae())
    assert told.guidance.kind == "embedded"
    assert row.fitted(UNet(), Vae()).guidance == row.guidance


def test_a_vae_with_a_mean_and_deviation_is_scaled_by_them(tmp_path: Path) -> None:
    """Z x deviation / scale + mean before decoding, as SDXL's pipeline in diffusers; and back."""
    import numpy as np

    vae = Vae(
        scaling_factor=0.5,
        latents_mean=(-1.66, 1.89, -1.38, 2.52),
        latents_std=(8.49, 5.9, 6.55, 5.23),
    )
    row = family_of("StableDiffusionXLPipeline")
    latents = Latents.of(vae, row, tmp_path)
    z = np.random.default_rng(0).standard_normal((1, 4, 2, 2), np.float32)
    mean, deviation = (
        np.reshape(np.array(each, np.float32), (1, 4, 1, 1))
        for each in (vae.latents_mean, vae.latents_std)
    )
    decoded = z / latents.factor + latents.offset
    np.testing.assert_allclose(decoded, z * deviation / 0.5 + mean, rtol=1e-5)
    np.testing.assert_allclose((decoded - latents.offset) * latents.factor, z, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "pipeline"),
    [
        ({"shift_factor": 0.1}, "StableDiffusionXLPipeline"),
        ({"latents_mean": (1.0,) * 4, "latents_std": (1.0,) * 4}, "StableDiffusionPipeline"),
        ({"latents_mean": (1.0,) * 4}, "StableDiffusionXLPipeline"),
    ],
)
def test_what_a_family_does_not_apply_is_refused(
    tmp_path: Path, fields: dict[str, Any], pipeline: str
) -> None:
    """A field that would change the latents and that nobody applies is an error, not a picture."""
    with pytest.raises(ModelSourceError, match=next(iter(fields))):
        Latents.of(Vae(**fields), family_of(pipeline), tmp_path)


def test_vaes_that_overflow_are_known() -> None:
    """Those of SDXL and SD 2.x, unless they were trained for float16; that of SD 1.x is not."""
    sd, sdxl = family_of("StableDiffusionPipeline"), family_of("StableDiffusionXLPipeline")
    assert sdxl.vae_overflows(UNet(), Vae())
    assert not sdxl.vae_overflows(UNet(), Vae(force_upcast=False))
    assert sd.vae_overflows(UNet(cross_attention_dim=1024), Vae())
    assert not sd.vae_overflows(UNet(cross_attention_dim=768), Vae())

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from holdfast.engine.errors import LoraError
from holdfast.engine.lora import check, fuse, read_lora
from tests.engine import lora_data, lora_graphs
from tests.engine.lora_graphs import Shapes, one_layer, projection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"


def square(*keys: str, value: float = 1.0) -> dict[str, np.ndarray]:
    return {key: np.full((4, 4), value, np.float32) for key in keys}


def pair(stem: str = "lora_unet_mid_block_attentions_0_proj_in") -> dict[str, np.ndarray]:
    return square(f"{stem}.lora_down.weight", f"{stem}.lora_up.weight")


Q = "lora_unet_x_attn1_to_q"
NAN = float("nan")
REFUSED_CONTENT: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "SDXL by its second text encoder": (
        pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        "trained for SDXL",
    ),
    "SDXL by its blocks": (pair("lora_unet_input_blocks_4_1_proj_in"), "trained for SDXL"),
    "SDXL of diffusers": (
        square("text_encoder_2.a.lora_A.weight", "text_encoder_2.a.lora_B.weight"),
        "trained for SDXL",
    ),
    "Flux of kohya": (pair("lora_unet_double_blocks_0_img_attn_qkv"), "a transformer"),
    "Flux of diffusers": (
        square("transformer.a.lora_A.weight", "transformer.a.lora_B.weight"),
        "a transformer",
    ),
    "DoRA of kohya": ({**pair(Q), **square(f"{Q}.dora_scale")}, "is DoRA"),
    "DoRA of PEFT": (square("unet.a.lora_magnitude_vector"), "is DoRA"),
    "LoHa": (square(f"{Q}.hada_w1_a", f"{Q}.hada_w1_b", f"{Q}.hada_w2_a"), "is LoHa"),
    "LoKr": (square(f"{Q}.lokr_w1", f"{Q}.lokr_w2"), "is LoKr"),
    "OFT": (square(f"{Q}.oft_blocks"), "is OFT"),
    "IA3": (square(f"{Q}.weight", f"{Q}.on_input"), "is IA3"),
    "Tucker": ({**pair(Q), **square(f"{Q}.lora_mid.weight")}, "Tucker"),
    "whole weights": (square(f"{Q}.diff"), "whole weights"),
    "biases": (
        square("unet.a.lora_A.weight", "unet.a.lora_B.weight", "unet.a.lora_B.bias"),
        "biases",
    ),
    "one matrix of two": (
        square("unet.a.lora_A.weight", "unet.b.lora_A.weight", "unet.b.lora_B.weight"),
        "only one of the two matrices of unet.a",
    ),
    "one matrix of two of kohya": (square(f"{Q}.lora_down.weight"), "cannot convert"),
    "an alpha without matrices": (
        {**pair(), f"{Q}.alpha": np.float32([1])},
        f"no matrices, for {Q}",
    ),
    "a whole model": (
        square("model.diffusion_model.out.2.weight", "model.diffusion_model.out.2.bias"),
        "name no layer",
    ),
    "both formats at once": ({**pair(), **square("unet.a.lora_A.weight")}, "name no layer"),
    "nothing": ({}, "holds no layers"),
    "NaN": (square(f"{Q}.lora_down.weight", f"{Q}.lora_up.weight", value=NAN), "finite"),
    "infinity": (square(f"{Q}.lora_down.weight", f"{Q}.lora_up.weight", value=np.inf), "finite"),
    "an alpha that is no number": ({**pair(Q), f"{Q}.alpha": np.float32([np.nan])}, "finite"),
    "two alphas for one layer": ({**pair(Q), f"{Q}.alpha": np.float32([1, 2])}, "fit each other"),
    "ranks that differ": (
        {f"{Q}.lora_down.weight": np.ones((4, 8)), f"{Q}.lora_up.weight": np.ones((8, 3))},
        "do not fit each other",
    ),
    "a 3x3 second matrix": (
        {
            f"{Q}.lora_down.weight": np.ones((4, 8, 1, 1)),
            f"{Q}.lora_up.weight": np.ones((8, 4, 3, 3)),
        },
        "do not fit each other",
    ),
}


@pytest.mark.parametrize("case", REFUSED_CONTENT)
def test_content_refused(tmp_path: Path, case: str) -> None:
    """A file that is not wholly a LoRA for this family is refused, and the error says why."""
    tensors, reason = REFUSED_CONTENT[case]
    path = tmp_path / "style.safetensors"
    save_file(tensors, path)
    with pytest.raises(LoraError, match=reason) as refused:
        read_lora(path)
    assert str(path) in str(refused.value)


def test_family_of_the_model(tmp_path: Path) -> None:
    """SDXL refuses the LoRAs of SD 1.x, and a family that no LoRA works for says so."""
    path = tmp_path / "style.safetensors"
    save_file(pair("lora_te_text_model_encoder_layers_0_mlp_fc1"), path)
    with pytest.raises(LoraError, match=re.escape("trained for SD 1.x or 2.x")):
        read_lora(path, "sdxl")
    with pytest.raises(LoraError, match="'flux'"):
        read_lora(path, "flux")


def pickled(path: Path) -> None:
    import torch

    torch.save({name: torch.from_numpy(value) for name, value in pair().items()}, path)


def good(path: Path) -> None:
    save_file(pair(), path)


def cut(path: Path) -> None:
    good(path)
    path.write_bytes(path.read_bytes()[:-3])


def no_settings(path: Path) -> None:
    save_file(pair(), path, metadata={"lora_adapter_metadata": '{"unet.lora_alpha": "much"}'})


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("x.safetensors", lambda _: None, "cannot be read: No such file"),
        ("x.safetensors", lambda path: path.mkdir(), "cannot be read: Is a directory"),
        ("x.ckpt", pickled, "pickles"),
        ("x.pt", pickled, "pickles"),
        ("x.bin", good, "pickles"),
        ("x.safetensors", pickled, "pickles"),
        ("x.safetensors", cut, "damaged"),
        ("x.safetensors", lambda path: path.write_bytes(b""), "damaged"),
        ("x.safetensors", lambda path: path.write_bytes(b"<html>404</html>" * 99), "damaged"),
        ("x.safetensors", no_settings, "damaged"),
    ],
)
def test_file_refused(
    tmp_path: Path, name: str, write: Callable[[Path], object], reason: str
) -> None:
    """A file that is missing, a pickle, cut short or otherwise damaged is refused."""
    write(tmp_path / name)
    with pytest.raises(LoraError, match=reason):
        read_lora(tmp_path / name)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


@given(data=st.data())
@settings(deadline=None)
def test_damage_is_never_another_error(fuzzed: Path, data: st.DataObject) -> None:
    """Whatever is cut off or overwritten in a file, it is read or refused with a `LoraError`."""
    save_file(pair(), fuzzed, metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 4}'})
    content = bytearray(fuzzed.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] = data.draw(st.integers(0, 255))
        fuzzed.write_bytes(content)
        with suppress(LoraError):
            assert read_lora(fuzzed).layers
    else:
        fuzzed.write_bytes(content[:place])
        with pytest.raises(LoraError):
            read_lora(fuzzed)


MISFITS = {
    "unknown": ("down_blocks_7_attentions_0_proj_in", (8, 8, 1, 1), "proj_in does not exist"),
    "narrower": (TO_Q.replace(".", "_"), (64, 48), r"to_q is \(64, 64\) and not \(64, 48\)"),
    "1x1 for 3x3": (CONV.replace(".", "_"), (64, 64, 1, 1), r"conv1 is \(64, 64, 3, 3\) and not"),
    "a norm": ("mid_block_attentions_0_norm", (64, 1), "norm is not the weight of a linear layer"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_misfit_refused(tiny_ir: Path, shapes: Shapes, tmp_path: Path, misfit: str) -> None:
    """One layer without a place, or of another shape, has the whole LoRA refused and is named."""
    stem, (outputs, *inputs), reason = MISFITS[misfit]
    deltas = lora_data.make(shapes, {"unet": lora_data.convolution}, seed=1)
    tensors = lora_data.kohya_tensors(deltas)
    tensors[f"lora_unet_{stem}.lora_down.weight"] = np.ones((4, *inputs), np.float32)
    ones = (1,) * (len(inputs) - 1)
    tensors[f"lora_unet_{stem}.lora_up.weight"] = np.ones((outputs, 4, *ones), np.float32)
    save_file(tensors, tmp_path / "style.safetensors")
    lora = read_lora(tmp_path / "style.safetensors")
    graph = lora_graphs.read(tiny_ir, "unet")
    with pytest.raises(LoraError, match=reason) as refused:
        check(lora, "unet", graph)
    assert f"1 of its {len(lora.layers['unet'])} layers" in str(refused.value)
    with pytest.raises(LoraError, match=reason):
        fuse(graph, "unet", [(lora, 1.0)])
    check(lora, "text_encoder", lora_graphs.read(tiny_ir, "text_encoder"))


def test_total_misfit_refused(tiny_ir: Path, shapes: Shapes, tmp_path: Path) -> None:
    """A LoRA of which no layer is in the graph is refused, with the first few names and a count."""
    deltas = lora_data.make(shapes, {"unet": lora_data.linear}, seed=1)
    lora = read_lora(lora_data.write_kohya(tmp_path / "style.safetensors", deltas))
    count = len(lora.layers["unet"])
    with pytest.raises(LoraError, match=f"{count} of its {count} .* and {count - 5} more"):
        check(lora, "unet", lora_graphs.read(tiny_ir, "text_encoder"))


def test_compressed_weights_refused() -> None:
    """An 8-bit weight has no room for a delta: the error says so."""
    graph = projection(np.ones((6, 5), np.uint8), ov.Type.u8)
    with pytest.raises(LoraError, match="layer is compressed to u8"):
        check(one_layer((6, 5)), "unet", graph)


def test_overflow_refused() -> None:
    """A sum that float16 cannot hold is refused instead of becoming infinite."""
    graph = projection(np.ones((6, 5), np.float32), ov.Type.f16)
    with pytest.raises(LoraError, match=r"unet\.layer larger than f16 can hold"):
        fuse(graph, "unet", [(one_layer((6, 5)), 1e6)])

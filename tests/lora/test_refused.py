from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from holdfast.engine.errors import LoraError
from holdfast.engine.lora import Strength, check, fuse, read_lora
from tests.support import lora_data, lora_graphs
from tests.support.lora_graphs import Shapes, one_layer, projection

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
    "a second text encoder of kohya": (
        pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        "changes the text_encoder_2 .* this model has text_encoder, unet only",
    ),
    "a second text encoder of diffusers": (
        square("text_encoder_2.a.lora_A.weight", "text_encoder_2.a.lora_B.weight"),
        "changes the text_encoder_2",
    ),
    "Flux of diffusers": (
        square("transformer.a.lora_A.weight", "transformer.a.lora_B.weight"),
        "changes the transformer",
    ),
    "GLoRA": (square(f"{Q}.a1.weight", f"{Q}.b1.weight"), "is GLoRA"),
    "OFT of PEFT": (square("unet.a.oft_R.default.weight"), "is OFT as PEFT"),
    "IA3": (square(f"{Q}.on_input"), "is IA3"),
    "norms": (square(f"{Q}.w_norm"), "changes norms"),
    "a bundled embedding": (
        {**pair(Q), **square("bundle_emb.style.string_to_param.*")},
        "is a LoRA with an embedding",
    ),
    "an embedding": (square("emb_params"), "is a textual inversion embedding"),
    "an embedding for SDXL": (square("clip_g", "clip_l"), "is a textual inversion embedding"),
    "biases": (
        square("unet.a.lora_A.weight", "unet.a.lora_B.weight", "unet.a.lora_B.bias"),
        "changes biases",
    ),
    "one matrix of two": (
        square("unet.a.lora_A.weight", "unet.b.lora_A.weight", "unet.b.lora_B.weight"),
        "holds only down, which is no whole layer of any kind for unet.a",
    ),
    "one matrix of two of kohya": (square(f"{Q}.lora_down.weight"), "holds only down"),
    "an alpha without matrices": (
        {**pair(), f"{Q}.alpha": np.float32([1])},
        "holds only alpha, .* for unet.x_attn1_to_q",
    ),
    "half of LoHa": (square(f"{Q}.hada_w1_a", f"{Q}.hada_w1_b"), "no whole layer"),
    "half of LoKr": (square(f"{Q}.lokr_w1", f"{Q}.lokr_w2_a"), "do not fit each other"),
    "two kinds at once": ({**pair(Q), **square(f"{Q}.lokr_w1")}, "no whole layer"),
    "a whole checkpoint": (
        square("model.diffusion_model.out.2.weight", "first_stage_model.x.bias"),
        "is a whole checkpoint .* Give it as `model`",
    ),
    "a UNet": (square("down_blocks.0.resnets.0.conv1.weight"), "is a model's weights"),
    "keys of nothing": (square("lora_unet_x.lora_sideways.weight", "y"), "2 keys that name no"),
    "one layer twice": (
        {**pair("lora_unet_mid_block_x"), **pair("unet.mid_block.x")},
        "names one layer twice",
    ),
    "nothing": ({}, "holds no layers"),
    "NaN": (square(f"{Q}.lora_down.weight", f"{Q}.lora_up.weight", value=NAN), "finite"),
    "infinity": (square(f"{Q}.lora_down.weight", f"{Q}.lora_up.weight", value=np.inf), "finite"),
    "an alpha that is no number": ({**pair(Q), f"{Q}.alpha": np.float32([np.nan])}, "finite"),
    "two alphas for one layer": ({**pair(Q), f"{Q}.alpha": np.float32([1, 2])}, "of 2 numbers"),
    "scalars for matrices": (
        {
            f"{Q}.lora_down.weight": np.array(1, np.float32),
            f"{Q}.lora_up.weight": np.array(1, np.float32),
        },
        "do not fit each other",
    ),
    "scalars for LoHa's": (
        {f"{Q}.hada_w{side}_{part}": np.array(1, np.float32) for side in "12" for part in "ab"},
        "do not fit each other",
    ),
    "scalars for OFT's": ({f"{Q}.oft_blocks": np.array(1, np.float32)}, "do not fit each other"),
    "a scalar for a magnitude": (
        {**pair(Q), f"{Q}.dora_scale": np.array(1, np.float32)},
        "do not fit",
    ),
    "matrices of nothing": (
        {f"{Q}.lora_down.weight": np.ones((0, 4)), f"{Q}.lora_up.weight": np.ones((4, 0))},
        "do not fit each other",
    ),
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


def pickled(path: Path) -> None:
    import torch

    torch.save({name: torch.from_numpy(value) for name, value in pair().items()}, path)


def good(path: Path) -> None:
    save_file(pair(), path)


def cut(path: Path) -> None:
    good(path)
    path.write_bytes(path.read_bytes()[:-3])


def header(content: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))

    return write


def deep_header(path: Path) -> None:
    header(b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")(path)


def deep_settings(path: Path) -> None:
    save_file(pair(), path, metadata={"lora_adapter_metadata": "[" * 100_000 + "]" * 100_000})


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
        (
            "x.safetensors",
            header({"a": {"dtype": "F32", "shape": [1], "data_offsets": "04"}}),
            "damaged",
        ),
        (
            "x.safetensors",
            header({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}}),
            "damaged",
        ),
        ("x.safetensors", header({"a": 7}), "damaged"),
        ("x.safetensors", header([1]), "damaged"),
        ("x.safetensors", lambda path: path.write_bytes(b"\xff" * 64), "damaged"),
        ("x.safetensors", deep_header, "damaged"),
        ("x.safetensors", deep_settings, "damaged"),
        ("x.safetensors", os.mkfifo, "a device or a pipe"),
        (
            "x.safetensors",
            lambda path: save_file({"base_model.model.a.lora_A.weight": np.eye(2)}, path),
            "adapter_config.json",
        ),
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
        fuse(graph, "unet", [(lora, Strength(1.0))])
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
        fuse(graph, "unet", [(one_layer((6, 5)), Strength(1e6))])


def test_lost_names_are_told(tiny_ir: Path, shapes: Shapes, tmp_path: Path) -> None:
    """A graph whose weights have lost torch's names is named as the cause, and not the LoRA."""
    deltas = lora_data.make(shapes, {"unet": lora_data.linear}, seed=1)
    lora = read_lora(lora_data.write_kohya(tmp_path / "style.safetensors", deltas))
    graph = lora_graphs.read(tiny_ir, "unet")
    check(lora, "unet", graph)
    products = [node for node in graph.get_ops() if node.get_type_name() == "MatMul"]
    for index, node in enumerate(products):
        source = node.input_value(1).get_node()
        if source.get_type_name() == "Constant":
            source.set_friendly_name(f"onnx::MatMul_{index}")
    with pytest.raises(
        LoraError, match=r"lost the names .* 'onnx::MatMul_\d+'.* came through ONNX"
    ):
        check(lora, "unet", graph)


def test_another_kind_of_model_is_told(tiny_ir: Path, tmp_path: Path) -> None:
    """Where not one layer is in the model, the error shows names of both sides."""
    save_file(pair("lora_unet_double_blocks_0_img_attn_qkv"), tmp_path / "flux.safetensors")
    lora = read_lora(tmp_path / "flux.safetensors")
    with pytest.raises(LoraError, match="double_blocks_0_img_attn_qkv does not exist") as refused:
        check(lora, "unet", lora_graphs.read(tiny_ir, "unet"))
    assert "Not one of its layers is in this model, which has conv_in" in str(refused.value)

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import pytest
from safetensors.numpy import save_file

from holdfast.engine.imports import quiet
from holdfast.engine.lora import Strength, fuse, read_lora, targets
from holdfast.engine.lora.names import flat, spellings
from tests.support import lora_data, lora_graphs
from tests.support.lora_graphs import Shapes, one_layer, projection

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

COMPONENTS = ("unet", "text_encoder")
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
PROMPT = "a large red circle on a blue background"
KINDS = {
    "linear": {"unet": lora_data.linear},
    "convolutions": {"unet": lora_data.convolution},
    "text encoder": {"text_encoder": lambda _: True},
    "everything": {"unet": lambda _: True, "text_encoder": lambda _: True},
}
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"


@dataclass(frozen=True)
class Tiny:
    """
    One tiny model as diffusers and as OpenVINO have it, and what it does without a LoRA.

    Attributes:
        diffusers: Folder of torch weights.
        openvino: Folder of the graphs, in float32.
        outputs: Of each component for :func:`inputs`, from diffusers.
        image: For ``PROMPT``, from diffusers, 0 to 255.
    """

    diffusers: Path
    openvino: Path
    outputs: dict[str, np.ndarray]
    image: np.ndarray

    def graph(self, component: str) -> ov.Model:
        return lora_graphs.read(self.openvino, component)


@pytest.fixture(scope="module")
def tiny(tiny_sd: Path, tiny_ir: Path) -> Tiny:
    plain = torch_pipeline(tiny_sd, [])
    return Tiny(tiny_sd, tiny_ir, torch_outputs(plain), paint(plain))


def torch_pipeline(folder: Path, loras: Sequence[tuple[Path, float]]) -> Any:
    """Load the model with diffusers in float32, with LoRAs fused by diffusers."""
    from diffusers import StableDiffusionPipeline

    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        for path, _ in loras:
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=path.stem)
        if loras:
            names, weights = zip(*((path.stem, weight) for path, weight in loras), strict=True)
            pipeline.set_adapters(list(names), list(weights))
            pipeline.fuse_lora(adapter_names=list(names))
            pipeline.unload_lora_weights()
    return pipeline


def fused_graphs(tiny: Tiny, loras: Sequence[tuple[Path, float]]) -> dict[str, ov.Model]:
    files = [(read_lora(path), Strength(weight)) for path, weight in loras]
    return {name: fuse(tiny.graph(name), name, files) for name in COMPONENTS}


def torch_outputs(pipeline: Any) -> dict[str, np.ndarray]:
    """Return one noise prediction and one text embedding."""
    import torch

    given = inputs()
    with torch.no_grad():
        return {
            "unet": pipeline.unet(
                torch.from_numpy(given["unet"]["sample"]),
                torch.tensor(500),
                torch.from_numpy(given["unet"]["encoder_hidden_states"]),
            ).sample.numpy(),
            "text_encoder": pipeline.text_encoder(
                torch.from_numpy(given["text_encoder"]["input_ids"])
            ).last_hidden_state.numpy(),
        }


def openvino_outputs(graphs: dict[str, ov.Model]) -> dict[str, np.ndarray]:
    given = inputs()
    return {
        name: ov.Core().compile_model(graph, "CPU", F32)(given[name])[0]
        for name, graph in graphs.items()
    }


def inputs() -> dict[str, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return {
        "unet": {
            "sample": random.normal(size=(2, 4, 8, 8)).astype(np.float32),
            "timestep": np.array(500, np.int64),
            "encoder_hidden_states": random.normal(size=(2, 77, 32)).astype(np.float32),
        },
        "text_encoder": {"input_ids": random.integers(0, 500, size=(1, 77))},
    }


def paint(pipeline: Any) -> np.ndarray:
    """Run four steps with guidance from fixed noise and return the image, 0 to 255."""
    latents = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    import torch

    with quiet():
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            PROMPT,
            height=64,
            width=64,
            num_inference_steps=4,
            guidance_scale=5.0,
            latents=torch.from_numpy(latents),
            output_type="np",
        ).images
    return np.asarray(images) * 255.0


def openvino_pipeline(tiny: Tiny, graphs: dict[str, ov.Model]) -> Any:
    """Load the model with optimum-intel, with these graphs in place of its own."""
    from optimum.intel import OVStableDiffusionPipeline

    with quiet():
        pipeline = OVStableDiffusionPipeline.from_pretrained(
            tiny.openvino, compile=False, ov_config=dict(F32), safety_checker=None
        )
        for name, graph in graphs.items():
            getattr(pipeline, name).model = graph
        pipeline.compile()
    return pipeline


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_as_diffusers(tiny: Tiny, loras: Sequence[tuple[Path, float]]) -> None:
    """Compare component outputs and whole images, and see that the LoRAs change them."""
    graphs = fused_graphs(tiny, loras)
    reference = torch_pipeline(tiny.diffusers, loras)
    expected = torch_outputs(reference)
    touched = {name for path, _ in loras for name in read_lora(path).layers}
    for name, output in openvino_outputs(graphs).items():
        assert relative(output, expected[name]) < 1e-4
        assert (relative(expected[name], tiny.outputs[name]) > 0.05) == (name in touched)
    image, wanted = paint(openvino_pipeline(tiny, graphs)), paint(reference)
    assert np.abs(image - wanted).mean() <= 1
    assert np.abs(image - wanted).max() <= 8
    assert np.abs(wanted - tiny.image).mean() > 4


def constants(model: ov.Model) -> dict[str, np.ndarray]:
    return {
        node.get_friendly_name(): node.data
        for node in model.get_ops()
        if node.get_type_name() == "Constant"
    }


# As diffusers


@pytest.mark.parametrize("form", lora_data.WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_as_diffusers_does(
    tiny: Tiny, shapes: Shapes, tmp_path: Path, kind: str, form: str
) -> None:
    """A LoRA of any kind of layer, in either format, gives the images that diffusers gives."""
    deltas = lora_data.make(shapes, KINDS[kind], seed=1)
    path = lora_data.WRITERS[form](tmp_path / "style.safetensors", deltas)
    assert_as_diffusers(tiny, [(path, 0.8)])


def test_two_at_once_as_diffusers_does(tiny: Tiny, shapes: Shapes, tmp_path: Path) -> None:
    """Two LoRAs of different formats, ranks and layers add up as they do in diffusers."""
    first = lora_data.make(shapes, KINDS["everything"], seed=1)
    second = lora_data.make(shapes, KINDS["everything"], seed=2, rank=8, alpha=8.0)
    assert_as_diffusers(
        tiny,
        [
            (lora_data.write_diffusers(tmp_path / "ink.safetensors", first), 0.7),
            (lora_data.write_kohya(tmp_path / "night.safetensors", second), 0.4),
        ],
    )


def test_negative_weight_as_diffusers_does(tiny: Tiny, shapes: Shapes, tmp_path: Path) -> None:
    """A negative weight takes the deltas away, as it does in diffusers."""
    deltas = lora_data.make(shapes, KINDS["everything"], seed=3)
    path = lora_data.write_kohya(tmp_path / "style.safetensors", deltas)
    assert_as_diffusers(tiny, [(path, -0.6)])


def test_scales_of_peft_as_diffusers_does(tiny: Tiny, shapes: Shapes, tmp_path: Path) -> None:
    """An alpha of single layers and rank stabilisation, as PEFT writes them down, are obeyed."""
    deltas = lora_data.make(shapes, KINDS["linear"], seed=4)
    path = lora_data.write_diffusers(
        tmp_path / "style.safetensors", deltas, alpha_pattern={TO_Q: 9.0}, use_rslora=True
    )
    layers = read_lora(path).layers["unet"]
    assert layers[flat(TO_Q)].alpha == 9 * np.sqrt(4)
    assert layers[flat(TO_Q.replace("to_q", "to_k"))].alpha == 2 * np.sqrt(4)
    assert_as_diffusers(tiny, [(path, 0.5)])


# What is read


def test_both_formats_hold_the_same(shapes: Shapes, tmp_path: Path) -> None:
    """The same deltas are read from both formats, under the names of the model's modules."""
    deltas = lora_data.make(shapes, KINDS["everything"], seed=1)
    for form, write in lora_data.WRITERS.items():
        lora = read_lora(write(tmp_path / f"{form}.safetensors", deltas))
        assert {name: set(part) for name, part in lora.layers.items()} == {
            name: set(map(flat, part)) for name, part in shapes.items()
        }
        for component, part in deltas.layers.items():
            for module, (down, up) in part.items():
                layer = lora.layers[component][flat(module)]
                assert np.array_equal(layer.down, down)
                assert np.array_equal(layer.up, up)
                assert layer.alpha == deltas.alpha
                assert layer.shape == shapes[component][module]


@pytest.mark.parametrize(
    ("stem", "component", "layer"),
    [
        ("unet.a.attn1.processor.to_q_lora{}", "unet", "a.attn1.to_q"),
        ("unet.a.attn1.processor.to_out_lora{}", "unet", "a.attn1.to_out.0"),
        ("mid_block.attn1.processor.to_q_lora{}", "unet", "mid_block.attn1.to_q"),
        ("unet.a.attn1.to_k.lora{}", "unet", "a.attn1.to_k"),
        ("base_model.model.down_blocks.0.a.lora_{}", "unet", "down_blocks.0.a"),
        ("base_model.model.unet.down_blocks.0.a.lora_{}.default", "unet", "down_blocks.0.a"),
        ("diffusion_model.input_blocks.1.1.proj_in.lora_{}", "unet", "input_blocks.1.1.proj_in"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_{}", "unet", "input_blocks.4.1.proj_in"),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer{}",
            "text_encoder",
            "encoder.layers.0.self_attn.q_proj",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora{}",
            "text_encoder",
            "encoder.layers.0.self_attn.out_proj",
        ),
        (
            "text_encoder.encoder.layers.0.mlp.fc1.lora_{}",
            "text_encoder",
            "encoder.layers.0.mlp.fc1",
        ),
        (
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{}",
            "text_encoder",
            "encoder.layers.0.mlp.fc1",
        ),
        (
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{}",
            "text_encoder",
            "encoder.layers.0.mlp.fc1",
        ),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_{}",
            "text_encoder",
            "encoder.layers.0.mlp.fc1",
        ),
        ("lora_te2_text_projection.lora_{}", "text_encoder_2", "text_projection"),
    ],
)
def test_names_of_layers(tmp_path: Path, stem: str, component: str, layer: str) -> None:
    """Every spelling that trainers have had names a component and one of its layers."""
    dot = "" if stem.endswith(("_{}", ".default")) else "."
    sides = ("A", "B") if stem.endswith("default") else ("down", "up")
    keys = [stem.format(dot + side) + ".weight" for side in sides]
    tensors = {key: np.eye(4, dtype=np.float32) for key in keys}
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2}')
    save_file(tensors, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", ("unet", "text_encoder", "text_encoder_2"))
    assert {name: set(part) for name, part in lora.layers.items()} == {component: {flat(layer)}}


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_stored_precision(shapes: Shapes, tmp_path: Path, kind: str) -> None:
    """Matrices stored in another precision are read as float32, value for value."""
    import torch
    from safetensors.torch import save_file as save_torch

    deltas = lora_data.make(shapes, KINDS["linear"], seed=1)
    stored = {
        key: torch.from_numpy(value).to(getattr(torch, kind))
        for key, value in lora_data.kohya_tensors(deltas).items()
    }
    save_torch(stored, tmp_path / "x.safetensors")
    layer = read_lora(tmp_path / "x.safetensors").layers["unet"][flat(TO_Q)]
    key = f"lora_unet_{TO_Q.replace('.', '_')}.lora_down.weight"
    assert layer.down.dtype == np.float32
    assert np.array_equal(layer.down, stored[key].float().numpy())


def test_identity(shapes: Shapes, tmp_path: Path) -> None:
    """A LoRA is known by the digest of its bytes, not by its name; it cannot be changed."""
    deltas = lora_data.make(shapes, KINDS["linear"], seed=1)
    one = read_lora(lora_data.write_kohya(tmp_path / "one.safetensors", deltas))
    same = read_lora(lora_data.write_kohya(tmp_path / "same.safetensors", deltas))
    other = read_lora(
        lora_data.write_kohya(tmp_path / "other.safetensors", replace(deltas, alpha=3.0))
    )
    assert one.name == "one"
    assert one.digest == hashlib.sha256((tmp_path / "one.safetensors").read_bytes()).hexdigest()
    assert one == same != other
    assert len({one, same, other}) == 2
    with pytest.raises(TypeError):
        one.layers["unet"] = {}  # type: ignore[index] - that is what must fail


# What is fused


def test_untouched_constants_stay_shared(tiny: Tiny, shapes: Shapes, tmp_path: Path) -> None:
    """Only the constants of touched layers take memory; all others are those of the graph read."""
    deltas = lora_data.make(shapes, {"unet": lambda module: module in {TO_Q, CONV}}, seed=1)
    lora = read_lora(lora_data.write_kohya(tmp_path / "style.safetensors", deltas))
    graph = tiny.graph("unet")
    before = {name: data.copy() for name, data in constants(graph).items()}
    fused = constants(fuse(graph, "unet", [(lora, Strength(1.0))]))
    assert fused.keys() == before.keys()
    moved = {
        name
        for name, data in constants(graph).items()
        if data.ctypes.data != fused[name].ctypes.data
    }
    assert moved == {f"self.{TO_Q}.weight", f"self.{CONV}.weight"}
    assert all(np.array_equal(before[name], data) for name, data in constants(graph).items())


@pytest.mark.parametrize("loras", ["none", "weight 0"])
def test_nothing_to_fuse(tiny: Tiny, shapes: Shapes, tmp_path: Path, loras: str) -> None:
    """No LoRA, or one of weight 0, gives a clone that shares every constant."""
    deltas = lora_data.make(shapes, KINDS["everything"], seed=1)
    lora = read_lora(lora_data.write_kohya(tmp_path / "style.safetensors", deltas))
    graph = tiny.graph("unet")
    fused = fuse(graph, "unet", [] if loras == "none" else [(lora, Strength(0.0))])
    assert fused is not graph
    kept = constants(graph)
    for name, data in constants(fused).items():
        assert data.ctypes.data == kept[name].ctypes.data


def test_half_precision_graph(tiny: Tiny, shapes: Shapes, tmp_path: Path) -> None:
    """In a graph stored in float16 the sum is made in float32 and rounded once, to float16."""
    deltas = lora_data.make(shapes, KINDS["everything"], seed=1)
    lora = read_lora(lora_data.write_kohya(tmp_path / "style.safetensors", deltas))
    for component in COMPONENTS:
        ov.save_model(tiny.graph(component), tmp_path / "half.xml", compress_to_fp16=True)
        graph = ov.Core().read_model(tmp_path / "half.xml")
        fused = fuse(graph, component, [(lora, Strength(0.8))])
        before, after = constants(graph), constants(fused)
        modules = spellings(targets(graph).keys())
        for layer_name, layer in lora.layers[component].items():
            module = modules[layer_name]
            name = targets(graph)[module].constant.get_friendly_name()
            assert after[name].dtype == np.float16
            product = np.einsum("or...,ri...->oi...", layer.up, layer.down, dtype=np.float64)
            expected = before[name] + 0.8 * 2 / 4 * product
            np.testing.assert_allclose(after[name], expected, rtol=2**-11 + 1e-6, atol=2**-25)
        full = fuse(tiny.graph(component), component, [(lora, Strength(0.8))])
        outputs = openvino_outputs({component: fused})
        assert relative(outputs[component], openvino_outputs({component: full})[component]) < 0.02


@pytest.mark.parametrize("kind", [ov.Type.f32, ov.Type.f16, ov.Type.bf16])
@pytest.mark.parametrize("transpose", [True, False])
def test_element_types_and_orientations(kind: ov.Type, *, transpose: bool) -> None:
    """Each element type is kept, and a weight that lies the other way round gets its delta so."""
    import torch

    lora = one_layer((6, 5))
    # bfloat16 holds these exactly, but few of the sums.
    weight = np.random.default_rng(1).integers(-128, 128, size=(6, 5)).astype(np.float32) / 64
    graph = projection(weight if transpose else weight.T, kind, transpose=transpose)
    place = targets(fuse(graph, "unet", [(lora, Strength(0.5))]))["layer"]
    assert place.shape == (6, 5)
    assert place.constant.get_element_type() == kind
    as_stored = getattr(
        torch, {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[kind.to_string()]
    )
    layer = lora.layers["unet"]["layer"]
    exact = weight + 0.5 * 1 / 2 * layer.up @ layer.down
    expected = torch.from_numpy(exact).to(as_stored).float().numpy()
    fused = place.constant.get_data(dtype=np.float32)
    assert np.array_equal(fused if transpose else fused.T, expected)


def test_change_and_removal_start_from_the_graph_read(
    tiny: Tiny, shapes: Shapes, tmp_path: Path
) -> None:
    """Fusing again with another weight owes nothing to the weight before."""
    deltas = lora_data.make(shapes, KINDS["everything"], seed=1)
    lora = read_lora(lora_data.write_kohya(tmp_path / "style.safetensors", deltas))
    graph = tiny.graph("unet")
    first = constants(fuse(graph, "unet", [(lora, Strength(0.8))]))
    fuse(graph, "unet", [(lora, Strength(2.5))])
    again = constants(fuse(graph, "unet", [(lora, Strength(0.8))]))
    assert all(np.array_equal(first[name], data) for name, data in again.items())


def test_fusing_needs_no_torch() -> None:
    """Neither the import of the package nor a fusion loads torch, diffusers or optimum."""
    code = """
import sys
import holdfast.engine.lora as lora
heavy = {"torch", "diffusers", "transformers", "optimum"}
assert not ({"openvino"} | heavy) & sys.modules.keys()
import numpy as np, openvino as ov
from openvino import opset13 as ops
weight = ops.constant(np.zeros((3, 2), np.float32))
weight.set_friendly_name("self.layer.weight")
data = ops.parameter([1, 2], np.float32)
model = ov.Model([ops.matmul(data, weight, False, True)], [data], "x")
layer = lora.LoraLayer(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 1.0)
file = lora.LoraFile("x", "0", {"unet": {"layer": layer}})
fused = lora.fuse(model, "unet", [(file, lora.Strength(2.0))])
assert (lora.targets(fused)["layer"].constant.data == 2).all()
assert not heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603 - our own interpreter

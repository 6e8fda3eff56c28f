"""Each kind of file beside plain LoRA, against those who defined it, on the same file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from holdfast.engine.errors import LoraError
from holdfast.engine.imports import heavy
from holdfast.engine.lora import LoraFile, LoraLayer, Strength, check, fuse, read_lora, targets
from holdfast.engine.lora.changes import change_of
from tests.support.lora_graphs import projection

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

STEM = "lora_unet_layer"
SHAPES = {"linear": (32, 16), "convolution": (32, 16, 3, 3), "1x1 convolution": (32, 16, 1, 1)}

# LyCORIS 4.1 scales LoHa and LoKr by alpha / rank twice when it merges, and once when it trains.
FOUR = {"alpha": 4}
TWO = {"lora_dim": 2, "alpha": 2}
# How LyCORIS is asked for each kind, and which layers it takes.
KINDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "LoCon": ("LoConModule", {}, (*SHAPES,)),
    "LoCon, Tucker": ("LoConModule", {"use_tucker": True}, ("convolution",)),
    "LoHa": ("LohaModule", FOUR, (*SHAPES,)),
    "LoHa, Tucker": ("LohaModule", {"use_tucker": True, **FOUR}, ("convolution",)),
    "LoKr": ("LokrModule", TWO, (*SHAPES,)),
    "LoKr, both factored": (
        "LokrModule", {"decompose_both": True, "lora_dim": 1, "alpha": 1}, (*SHAPES,)
    ),
    "LoKr, Tucker": ("LokrModule", {"use_tucker": True, **TWO}, ("convolution",)),
    "LoKr, full": ("LokrModule", {"full_matrix": True}, (*SHAPES,)),
    "OFT": ("DiagOFTModule", {}, (*SHAPES,)),
    "OFT, bound": ("DiagOFTModule", {"constraint": 1e-2}, ("linear",)),
    "OFT, rescaled": ("DiagOFTModule", {"rescaled": True}, (*SHAPES,)),
    "BOFT": ("ButterflyOFTModule", {}, (*SHAPES,)),
    "BOFT, rescaled": ("ButterflyOFTModule", {"rescaled": True}, ("linear",)),
    "DoRA of rows": ("LoConModule", {"weight_decompose": True}, (*SHAPES,)),
    "DoRA of columns": (
        "LoConModule", {"weight_decompose": True, "wd_on_out": False}, (*SHAPES,)
    ),
    "LoHa with DoRA": ("LohaModule", {"weight_decompose": True, **FOUR}, (*SHAPES,)),
    "LoKr with DoRA": ("LokrModule", {"weight_decompose": True, **TWO}, (*SHAPES,)),
}  # fmt: skip
CASES = [(kind, layer) for kind, (_, _, layers) in KINDS.items() for layer in layers]


def lycoris_of(kind: str, shape: tuple[int, ...]) -> Any:
    """Return LyCORIS' module of a kind on a random layer, its parameters random as well."""
    heavy()
    import lycoris.modules
    import torch

    name, options, _ = KINDS[kind]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        outputs, inputs, *sides = shape
        layer: Any = (
            torch.nn.Conv2d(inputs, outputs, tuple(sides)) if sides
            else torch.nn.Linear(inputs, outputs)
        )  # fmt: skip
        module = getattr(lycoris.modules, name)(
            STEM, layer, **{"multiplier": 1.0, "lora_dim": 4, "alpha": 2.0, **options}
        )
        for parameter_name, parameter in module.named_parameters():
            if not parameter_name.startswith("org"):
                parameter.add_(0.3 * torch.randn_like(parameter))
        layer.weight.requires_grad_(requires_grad=False)
    return module, layer


@pytest.mark.parametrize(("kind", "layer"), CASES)
def test_changes_are_those_of_lycoris(kind: str, layer: str, tmp_path: Path) -> None:
    """A file as LyCORIS writes it changes a weight as LyCORIS does, within 1e-3 of the change."""
    import torch

    module, original = lycoris_of(kind, SHAPES[layer])
    before = original.weight.detach().numpy()
    with torch.no_grad():
        merged = module.get_merged_weight(shape=before.shape)[0].numpy()
        state = {
            f"{STEM}.{name}": value.float().numpy() for name, value in module.state_dict().items()
        }
    ours = changed(state, before, tmp_path)
    assert np.abs(merged - before).max() > 1e-2
    assert np.abs(ours - merged).max() <= 1e-3 * np.abs(merged - before).max()


def changed(state: Mapping[str, Any], before: np.ndarray, folder: Path) -> np.ndarray:
    save_file(
        {name: np.ascontiguousarray(value) for name, value in state.items()},
        folder / "x.safetensors",
    )
    lora = read_lora(folder / "x.safetensors")
    change = lora.layers["unet"]["layer"]
    assert change.fits(before.shape)
    kept = before.copy()
    after = before + change.delta(before, 1.0)
    assert np.array_equal(kept, before)
    assert np.abs(change.delta(before, 0.0)).max() == 0
    return after


def test_products_are_scaled_by_alpha_over_rank(tmp_path: Path) -> None:
    """LoHa and LoKr are scaled once, as their functional forms define it and as they train."""
    heavy()
    import torch
    from lycoris.functional import loha, lokr

    random = np.random.default_rng(0)
    before = np.zeros((24, 16), np.float32)
    alpha = np.array([3], np.float32)

    def drawn(*size: int) -> np.ndarray:
        return random.normal(size=size).astype(np.float32)

    w1, w2_a, w2_b = drawn(4, 4), drawn(6, 2), drawn(2, 4)
    state = {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": alpha}
    ours = changed({f"{STEM}.{name}": value for name, value in state.items()}, before, tmp_path)
    first, *second = map(torch.from_numpy, (w1, w2_a, w2_b))
    theirs = lokr.diff_weight(first, None, None, None, *second, None, gamma=3.0).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)

    a1, b1, a2, b2 = drawn(24, 2), drawn(2, 16), drawn(24, 2), drawn(2, 16)
    state = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": alpha}
    ours = changed({f"{STEM}.{name}": value for name, value in state.items()}, before, tmp_path)
    factors = map(torch.from_numpy, (b1, a1, b2, a2))
    theirs = loha.diff_weight(*factors, None, None, gamma=3.0 / 2).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_difference_is_added_as_it_is(tmp_path: Path) -> None:
    """A file of whole differences adds them, times the weight."""
    before = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
    difference = np.ones_like(before)
    after = changed({f"{STEM}.diff": difference}, before, tmp_path)
    assert np.array_equal(after, before + difference)


@pytest.mark.parametrize("layer", SHAPES)
def test_dora_is_that_of_peft(layer: str, tmp_path: Path) -> None:
    """A magnitude vector as PEFT and diffusers store it gives the weights that PEFT merges."""
    heavy()
    import peft
    import torch

    outputs, inputs, *sides = SHAPES[layer]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        plain: Any = (
            torch.nn.Conv2d(inputs, outputs, tuple(sides)) if sides
            else torch.nn.Linear(inputs, outputs)
        )  # fmt: skip
        before = plain.weight.numpy().copy()
        config = peft.LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=["layer"])
        model = peft.inject_adapter_in_model(config, torch.nn.ModuleDict({"layer": plain}))
        wrapped = model["layer"]
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.rand_like(parameter))
        state = {
            f"unet.{name}": value.numpy()
            for name, value in peft.get_peft_model_state_dict(model).items()
        }
        wrapped.merge()
    state["unet.layer.alpha"] = np.float32([2])
    ours = changed(state, before, tmp_path)
    merged = wrapped.base_layer.weight.detach().numpy()
    assert np.abs(ours - merged).max() <= 1e-3 * np.abs(merged - before).max()


@pytest.mark.parametrize("kind", ["DoRA of rows", "OFT", "BOFT", "LoHa"])
def test_the_weight_is_a_way_between(kind: str) -> None:
    """Half the weight of a LoHa, DoRA or OFT is half the change; BOFT turns half at each stage."""
    module, original = lycoris_of(kind, SHAPES["linear"])
    before = original.weight.detach().numpy()
    names = {"lora_down.weight": "down", "lora_up.weight": "up"}
    change = change_of(
        {
            names.get(name, name): each.detach().numpy()
            for name, each in module.state_dict().items()
        },
        None,
    )
    half = change.delta(before, 0.5)
    if kind == "BOFT":
        theirs = module.get_diff_weight(0.5)[0].detach().numpy()
    else:
        theirs = change.delta(before, 1.0) / 2
    np.testing.assert_allclose(half, theirs, atol=1e-5)


def test_changes_of_several_files_do_not_depend_on_their_order() -> None:
    """What looks at the model's weight sees it as it was, whatever else is fused."""
    weight = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    plain = LoraLayer(np.ones((1, 4), np.float32), np.ones((6, 1), np.float32), 1.0)
    dora = change_of(
        {"down": plain.down, "up": plain.up, "dora_scale": np.full((6, 1), 2, np.float32)}, None
    )
    files = [(LoraFile(str(index), str(index), {"unet": {"layer": each}}), Strength(0.5))
             for index, each in enumerate((plain, dora))]  # fmt: skip
    one, other = (
        targets(fuse(projection(weight), "unet", order))["layer"].constant.data
        for order in (files, files[::-1])
    )
    assert np.array_equal(one, other)
    expected = weight + plain.delta(weight, 0.5) + dora.delta(weight, 0.5)
    np.testing.assert_allclose(one, expected, atol=1e-6)


# Blocks -------------------------------------------------------------------------------------------


def test_the_first_pattern_that_matches_decides() -> None:
    """Factors of blocks multiply the weight; a layer that no pattern matches keeps it."""
    strength = Strength(0.5, (("unet.up.*.conv", 0.0), ("unet.up.*", 2.0)))
    assert strength.of("unet.up.1.conv") == 0
    assert strength.of("unet.up.1.to_q") == 1
    assert strength.of("unet.down.1.to_q") == 0.5
    assert str(strength) == "0.5[unet.up.*.conv=0, unet.up.*=2]"


def test_a_pattern_of_no_layer_is_refused() -> None:
    """A pattern that matches nothing is an error, and shows names that would match."""
    plain = LoraLayer(np.ones((1, 4), np.float32), np.ones((6, 1), np.float32), 1.0)
    lora = LoraFile("x", "0", {"unet": {"layer": plain}})
    graph = projection(np.zeros((6, 4), np.float32))
    check(lora, "unet", graph, Strength(1.0, (("unet.la*", 0.5), ("text_encoder.x", 0.0))))
    with pytest.raises(LoraError, match=r"blocks 'unet.up.\*'.* no such layer. It has: unet.layer"):
        check(lora, "unet", graph, Strength(1.0, (("unet.up.*", 0.5),)))
    fused = fuse(graph, "unet", [(lora, Strength(1.0, (("unet.*", 0.5),)))])
    assert (targets(fused)["layer"].constant.data == 0.5).all()

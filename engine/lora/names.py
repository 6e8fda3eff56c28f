"""
Names of layers: as the trainers write them, and as a graph has them.

Where a graph says ``down_blocks.0.resnets.0.conv1``, one trainer's file says
``lora_unet_down_blocks_0_resnets_0_conv1`` and another's ``input_blocks.1.0.in_layers.2``.
Underscores cannot be told from dots, nor blocks be counted, without the model. So both sides are
spelled flat (dots become underscores), and the graph's own modules say which layers there are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

# How a name begins that is of a component's layer.
_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("lora_unet_", "oft_unet_", "unet.", "diffusion_model."),
    "text_encoder": (
        "lora_te_", "lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.",
    ),
    "text_encoder_2": ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer."),
    "text_encoder_3": ("lora_te3_", "text_encoder_3."),
    "transformer": ("lora_transformer_", "transformer."),
}  # fmt: skip
_PEFT = "base_model.model."

# How names begin that say no component but can be of one alone.
_BARE = {
    "unet": re.compile(
        r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding"
        r"|input_blocks|middle_block|output_blocks|time_embed|label_emb)(\.|$)"
    ),
    "text_encoder": re.compile(r"(text_model|encoder)\."),
}

# What stands after a layer's name, and what it is.
_ROLES: Mapping[str, str] = {
    "down": r"lora_(A|down)(\.default)?\.weight|lora(_linear_layer)?\.down\.weight",
    "up": r"lora_(B|up)(\.default)?\.weight|lora(_linear_layer)?\.up\.weight",
    "mid": r"lora_mid\.weight",
    "alpha": r"alpha",
    "dora_scale": r"dora_scale",
    "magnitude": r"lora_magnitude_vector(\.default)?(\.weight)?",
    "whole": r"diff",
    **{name: name for side in "12" for name in (f"hada_w{side}_a", f"hada_w{side}_b")},
    **{name: name for name in ("hada_t1", "hada_t2")},
    **{name: name for side in "12" for name in (f"lokr_w{side}_a", f"lokr_w{side}_b")},
    **{name: name for name in ("lokr_w1", "lokr_w2", "lokr_t2")},
    **{name: name for name in ("oft_blocks", "rescale")},
}
_KEY = re.compile(
    r"(?P<layer>.+)\.(?:" + "|".join(f"(?P<{role}>{form})" for role, form in _ROLES.items()) + ")"
)

# Until 2023 diffusers put attention's LoRAs beside the layers and not inside them.
_BESIDE = re.compile(r"(?:\.processor)?\.to_(?P<what>q|k|v|out)_lora\.(?=down|up)")
_BESIDE_NAMES = {
    "unet": {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
    "text": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"},
}

# The original code base's names of a UNet's parts outside of its blocks, and inside of a block.
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_INNER = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?P<side>down_blocks\.(?P<down>\d+)|mid_block|up_blocks\.(?P<up>\d+))"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)"
)


class LayerKey(NamedTuple):
    """
    What a key of a file names.

    Attributes:
        component: For example ``"unet"``.
        layer: The layer's name, flat.
        role: Which of the layer's tensors it is: ``"down"``, ``"alpha"``, ...
    """

    component: str
    layer: str
    role: str


def layer_key(key: str, components: Collection[str]) -> LayerKey | None:
    """
    Take a file's key apart.

    Args:
        key: As the file has it.
        components: Those of the model; they decide what a name without a component can be of.

    Returns:
        None where it is no key of a layer's.
    """
    text = "text" if re.match(r"text_encoder|lora_te", key) else "unet"
    key = _BESIDE.sub(lambda match: f".{_BESIDE_NAMES[text][match['what']]}.lora.", key)
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    role = next(role for role in _ROLES if found[role] is not None)
    name = found["layer"].removeprefix(_PEFT)
    for component, prefixes in _PREFIXES.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                return LayerKey(component, flat(name.removeprefix(prefix)), role)
    for component, form in _BARE.items():
        alone = component != "text_encoder" or "text_encoder_2" not in components
        if form.match(name) and alone:
            return LayerKey(component, flat(name), role)
    return None


def is_peft(key: str) -> bool:
    """Tell whether PEFT wrote the key: then it keeps alpha in a file beside."""
    return key.startswith(_PEFT)


def flat(module: str) -> str:
    """Return a module's name as kohya has it; transformers gives some a prefix, and some not."""
    return module.removeprefix("text_model.").replace(".", "_").removeprefix("text_model_")


def spellings(modules: Collection[str]) -> dict[str, str]:
    """
    Return the flat names that files have for a graph's modules, each with its module.

    Args:
        modules: Torch module paths, for example ``"down_blocks.0.resnets.0.conv1"``.
    """
    names = {flat(module): module for module in modules}
    names |= {flat(original): module for original, module in originals(modules)}
    return names


def originals(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the original code base's names of a UNet's modules, where it has one."""
    blocks = [(module, found) for module in modules if (found := _BLOCK.fullmatch(module))]
    held: dict[str, dict[str, set[int]]] = {}
    for _, block in blocks:
        kinds = held.setdefault(block["side"], {})
        kinds.setdefault(block["kind"], set()).add(int(block["index"]))
    first, last, place = {}, {}, {"down": 1, "up": 0}
    for side, kinds in sorted(held.items(), key=lambda each: _level(each[0])):
        if side == "mid_block":
            continue
        way = side.partition("_")[0]
        first[side] = place[way]
        place[way] += len(kinds.get("resnets", ()))
        last[side] = place[way] if way == "down" else place[way] - 1
        place[way] += way == "down" and "downsamplers" in kinds
    for module, block in blocks:
        side, kind, index = block["side"], block["kind"], int(block["index"])
        rest = block["rest"] if kind != "resnets" else _INNER.get(block["rest"], "")
        if not rest:
            continue
        if side == "mid_block":
            where = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * index}"
        elif kind == "downsamplers":
            where, rest = f"input_blocks.{last[side]}.0", rest.replace("conv", "op")
        elif kind == "upsamplers":
            where = f"output_blocks.{last[side]}.{1 + ('attentions' in held[side])}"
        else:
            outer = "input_blocks" if side.startswith("down") else "output_blocks"
            where = f"{outer}.{first[side] + index}.{int(kind == 'attentions')}"
        yield f"{where}.{rest}", module
    yield from ((original, ours) for ours, original in _OUTER.items() if ours in modules)


def _level(side: str) -> tuple[str, int]:
    name, _, level = side.partition(".")
    return name, int(level or 0)

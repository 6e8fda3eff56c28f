"""
A VAE's graph in two halves: one that sees the whole image, and one that runs tile by tile.

The half near the latents holds the attention and little memory; the half near the pixels is local,
but for its group norms. Those take the mean and deviation of the whole image as inputs here, and
tell what they measure on the part of a tile that is its own. `vae_tiles` makes use of it.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from holdfast.engine.graphs.vae_tiles import (
    MEASURED,
    NORMS,
    REACH,
    RIM,
    TILE,
    TILE_OUT,
    WHOLE,
    WHOLE_OUT,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


_OPTIONS = ["runtime_options"]
"""What an export asks of a compile, such as a scale of activations that float16 needs."""


class _Op(NamedTuple):
    """An operation of the local half, with pixels of `TILE` on one of its output."""

    node: ov.Node
    pixels: Fraction


def cut(graph: ov.Model, stride: int) -> ov.Model:
    """
    Return a VAE encoder or decoder as two halves side by side, whose weights are shared with it.

    OpenVINO runs a graph whole: whoever runs one half gives the other a few pixels to chew on.

    Args:
        graph: Image-like in and out, a batch of any size; left as it is.
        stride: Pixels of the image on the side of one where the halves meet; a power of two.

    Raises:
        ValueError: It has no such place, or norms of different group counts.
    """
    graph = graph.clone()
    changes = [node for node in graph.get_ordered_ops() if _scale(node) != 1]
    decoder = bool(changes) and _scale(changes[0]) > 1
    steps = int(math.log2(stride))
    if len(changes) < steps:
        msg = f"a VAE of {len(changes)} changes of size cannot be cut where the image is 1/{stride}"
        raise ValueError(msg)
    border = changes[-steps].input_value(0) if decoder else _biased(changes[steps - 1])
    given = graph.get_parameters()[0]
    wanted = graph.get_results()[0]

    far = ops.parameter(_free(border), ov.Type.f32)
    for target in border.get_target_inputs():
        target.replace_source_output(far.output(0))
    whole, tile = (given, far) if decoder else (far, given)
    near_end = ops.result(border)
    whole_out, tile_out = (near_end, wanted) if decoder else (wanted, near_end)

    rim = ops.parameter([2, 2], ov.Type.i64)
    local = list(_local(ov.Model([tile_out], [tile], "local")))
    norms = [each for each in local if each.node.get_type_name() == "GroupNormalization"]
    groups = {each.node.get_attributes()["num_groups"] for each in norms}
    if len(groups) != 1:
        msg = f"group norms of {sorted(groups)} groups cannot be told their statistics in one table"
        raise ValueError(msg)
    table = ops.parameter([len(norms), 2, *groups], ov.Type.f32)
    measured = [_tell(each, table, index, rim) for index, each in enumerate(norms)]

    inputs = {WHOLE: whole, TILE: tile, NORMS: table, RIM: rim}
    # OpenVINO runs what the first output needs first: each norm is measured as soon as it is there.
    # After the image, what all of them gave would be in memory at once.
    outputs = {
        MEASURED: ops.result(ops.concat(measured, 0)),
        WHOLE_OUT: whole_out,
        TILE_OUT: tile_out,
        REACH: ops.result(ops.constant(np.array([_reach(local)], np.int64))),
    }
    for name, node in inputs.items():
        node.output(0).set_names({name})
    for name, node in outputs.items():
        node.output(0).set_names({name})
    halves = ov.Model(
        list(outputs.values()), list(inputs.values()), f"{graph.get_name()} in halves"
    )
    if graph.has_rt_info(_OPTIONS):
        halves.set_rt_info(graph.get_rt_info(_OPTIONS).value, _OPTIONS)
    return halves


def _scale(node: ov.Node) -> Fraction | int:
    """Return how many pixels of its output a pixel of its input becomes, along one axis."""
    kind = node.get_type_name()
    if kind == "Interpolate":
        return 2
    if kind == "Convolution":
        return Fraction(1, node.get_attributes()["strides"][0])
    return 1


def _biased(convolution: ov.Node) -> ov.Output:
    """Return a convolution's output with its bias added."""
    (after,) = (each.get_node() for each in convolution.output(0).get_target_inputs())
    return after.output(0) if after.get_type_name() == "Add" else convolution.output(0)


def _free(output: ov.Output) -> ov.PartialShape:
    return ov.PartialShape([1, output.get_partial_shape()[1].get_length(), -1, -1])


def _local(half: ov.Model) -> Iterator[_Op]:
    pixels = Fraction(1)
    for node in half.get_ordered_ops():
        pixels /= _scale(node)
        yield _Op(node, pixels)


def _reach(local: list[_Op]) -> int:
    """Return how far the local half sees, in whole pixels of its input and of its output."""
    far = sum(
        each.pixels * _scale(each.node) * (each.node.input_value(1).get_shape()[-1] // 2)
        for each in local
        if each.node.get_type_name() == "Convolution"
    )
    grain = max(Fraction(1), local[-1].pixels)
    return int(math.ceil(far / grain) * grain)


def _tell(norm: _Op, table: ov.Node, index: int, rim: ov.Node) -> ov.Node:
    """Put a norm that is told its statistics in place of one that measures them; measure them."""
    node, pixels = norm
    channels = node.get_output_partial_shape(0)[1].get_length()
    groups, epsilon = (node.get_attributes()[name] for name in ("num_groups", "epsilon"))
    factor, shift = (_row(_row(table, index), each) for each in (0, 1))
    spread, sink = (_for_channels(each, groups, channels) for each in (factor, shift))
    normal = ops.add(ops.multiply(node.input_value(0), spread), sink)
    gain, bias = (_shaped(node.input_value(port), 1, channels, 1, 1) for port in (1, 2))
    done = ops.add(ops.multiply(normal, gain), bias)
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(done.output(0))

    cut_off = ops.divide(
        ops.multiply(rim, _integers(pixels.denominator)), _integers(pixels.numerator)
    )
    first, last = _row(cut_off, 0), _row(cut_off, 1)
    size = ops.gather(ops.shape_of(normal), _integers(2, 3), _integers(0))
    own = ops.slice(normal, first, ops.subtract(size, last), _integers(1, 1), _integers(2, 3))
    # What keeps a norm from dividing by nothing belongs to the mean square, so that whoever reads
    # it need not know how much that is.
    kept = ops.multiply(ops.multiply(factor, factor), ops.constant(np.float32(epsilon)))
    mean = _of_groups(own, groups, channels)
    square = ops.add(_of_groups(ops.multiply(own, own), groups, channels), kept)
    return ops.concat([_shaped(e, 1, 1, groups) for e in (mean, square)], 1)


def _for_channels(values: ov.Node, groups: int, channels: int) -> ov.Node:
    wide = ops.broadcast(
        _shaped(values, groups, 1),
        _integers(groups, channels // groups),
    )
    return _shaped(wide, 1, channels, 1, 1)


def _of_groups(values: ov.Node, groups: int, channels: int) -> ov.Node:
    of_channels = ops.reduce_mean(values, _integers(2, 3))
    split = _shaped(of_channels, groups, channels // groups)
    return ops.reduce_mean(split, _integers(1))


def _shaped(values: ov.Node | ov.Output, *shape: int) -> ov.Node:
    return ops.reshape(values, _integers(*shape), special_zero=False)


def _row(table: ov.Node, index: int) -> ov.Node:
    return ops.gather(table, ops.constant(np.int64(index)), _integers(0))


def _integers(*values: int) -> ov.Node:
    return ops.constant(np.array(values, np.int64))

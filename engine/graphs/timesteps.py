"""
Timesteps that reach a denoiser as the scheduler computes them.

An exported graph takes them as integers, and OpenVINO then computes their sinusoidal embedding in
the precision of all the rest. In bf16, with eight significant bits, 999 becomes 1000 and its angles
are off by up to two radians: most of what a denoiser in bf16 is off from one in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def accept_fractional_timesteps(graph: Any) -> None:
    """
    Let a denoiser's graph take its timestep as it is.

    An export traces it as an integer, so that the fractional timesteps of Euler or DPM++ would be
    cut to whole ones, and the image would differ from that of the model in PyTorch.
    """
    import openvino as ov

    for parameter in _parameters(graph, frozenset({"timestep"})):
        parameter.set_element_type(ov.Type.f32)
    graph.validate_nodes_and_infer_types()


def embed_timesteps_exactly(graph: Any) -> bool:
    """
    Have a denoiser's graph compute the angles of what it embeds, their sine and cosine in float32.

    That is its timestep, and the guidance where it is told that; flows scale both by 1000 first.

    Args:
        graph: It takes float timesteps, see `accept_fractional_timesteps`.

    Returns:
        Whether it has such an embedding; where it has none it is left as it is.
    """
    import numpy as np
    import openvino as ov
    from openvino import opset13

    found = False
    for parameter in _parameters(graph, _ANGLES):
        product, factor = _last_product(parameter)
        if product is None:
            continue
        node = product.get_node()
        core = ov.Core()
        exact = {
            each.get_friendly_name(): each
            for each in core.read_model(_EXACT.encode(), ov.Tensor(ov.Type.u8, [0])).get_ops()
        }
        shape = opset13.constant(np.array([-1, 1], np.int64))
        frequencies = node.input_value(1 - product.get_index())
        if factor != 1:
            scale = opset13.constant(np.float32(factor))
            frequencies = opset13.multiply(frequencies, scale).output(0)
        exact["column"].input(0).replace_source_output(parameter.output(0))
        exact["column"].input(1).replace_source_output(shape.output(0))
        exact["angles"].input(1).replace_source_output(frequencies)
        for wave in [each.get_node() for each in node.output(0).get_target_inputs()]:
            for target in wave.output(0).get_target_inputs():
                target.replace_source_output(exact[wave.get_type_name()].output(0))
        graph.validate_nodes_and_infer_types()
        found = True
    return found


_SHAPING = frozenset({"Broadcast", "Convert", "ConvertLike", "Reshape", "Unsqueeze"})
_ANGLES = frozenset({"timestep", "guidance"})
"""Inputs that a denoiser embeds as sines and cosines."""


def _parameters(graph: Any, names: frozenset[str]) -> Iterator[Any]:
    for parameter in graph.get_parameters():
        if names & parameter.output(0).get_names():
            yield parameter


def _last_product(parameter: Any) -> tuple[Any, float]:
    """
    Follow an input to where it is multiplied by frequencies.

    Returns:
        Its place in that product, and by what number it was multiplied before; None where it
        forks first, or goes anywhere else.
    """
    node, factor = parameter, 1.0
    while True:
        uses = list(node.output(0).get_target_inputs())
        if len(uses) != 1:
            return None, factor
        node = uses[0].get_node()
        if node.get_type_name() in _SHAPING:
            continue
        if node.get_type_name() != "Multiply":
            return None, factor
        waves = [each.get_node().get_type_name() for each in node.output(0).get_target_inputs()]
        if waves and set(waves) <= {"Sin", "Cos"}:
            return uses[0], factor
        number = _number(node.input_value(1 - uses[0].get_index()).get_node())
        if number is None:
            return None, factor
        factor *= number


def _number(node: Any) -> float | None:
    """Return the one value of a constant, whatever it is wrapped in; None where it has more."""
    while node.get_type_name() in _SHAPING:
        node = node.input_value(0).get_node()
    is_one = node.get_type_name() == "Constant" and node.get_data().size == 1
    return float(node.get_data().ravel()[0]) if is_one else None


# OpenVINO keeps an operation in float32 that bears this mark, and Python can set it by reading it
# alone. `column` is there because the operations that an export has in its place lose the mark.
_PRECISE = '<rt_info><attribute name="precise" version="0"/></rt_info>'
_EXACT = f"""<?xml version="1.0"?>
<net name="angles" version="11">
<layers>
<layer id="0" name="timestep" type="Parameter" version="opset1"><data shape="?" element_type="f32"/>
  <output><port id="0" precision="FP32"><dim>-1</dim></port></output></layer>
<layer id="1" name="shape" type="Parameter" version="opset1"><data shape="2" element_type="i64"/>
  <output><port id="0" precision="I64"><dim>2</dim></port></output></layer>
<layer id="2" name="frequencies" type="Parameter" version="opset1">
  <data shape="1,?" element_type="f32"/>
  <output><port id="0" precision="FP32"><dim>1</dim><dim>-1</dim></port></output></layer>
<layer id="3" name="column" type="Reshape" version="opset1"><data special_zero="false"/>{_PRECISE}
  <input><port id="0"><dim>-1</dim></port><port id="1"><dim>2</dim></port></input>
  <output><port id="2" precision="FP32"><dim>-1</dim><dim>1</dim></port></output></layer>
<layer id="4" name="angles" type="Multiply" version="opset1">
  <data auto_broadcast="numpy"/>{_PRECISE}
  <input><port id="0"><dim>-1</dim><dim>1</dim></port><port id="1"><dim>1</dim><dim>-1</dim></port>
  </input>
  <output><port id="2" precision="FP32"><dim>-1</dim><dim>-1</dim></port></output></layer>
<layer id="5" name="Sin" type="Sin" version="opset1">{_PRECISE}
  <input><port id="0"><dim>-1</dim><dim>-1</dim></port></input>
  <output><port id="1" precision="FP32"><dim>-1</dim><dim>-1</dim></port></output></layer>
<layer id="6" name="Cos" type="Cos" version="opset1">{_PRECISE}
  <input><port id="0"><dim>-1</dim><dim>-1</dim></port></input>
  <output><port id="1" precision="FP32"><dim>-1</dim><dim>-1</dim></port></output></layer>
<layer id="7" name="sine" type="Result" version="opset1">
  <input><port id="0"><dim>-1</dim><dim>-1</dim></port></input></layer>
<layer id="8" name="cosine" type="Result" version="opset1">
  <input><port id="0"><dim>-1</dim><dim>-1</dim></port></input></layer>
</layers>
<edges>
<edge from-layer="0" from-port="0" to-layer="3" to-port="0"/>
<edge from-layer="1" from-port="0" to-layer="3" to-port="1"/>
<edge from-layer="3" from-port="2" to-layer="4" to-port="0"/>
<edge from-layer="2" from-port="0" to-layer="4" to-port="1"/>
<edge from-layer="4" from-port="2" to-layer="5" to-port="0"/>
<edge from-layer="4" from-port="2" to-layer="6" to-port="0"/>
<edge from-layer="5" from-port="1" to-layer="7" to-port="0"/>
<edge from-layer="6" from-port="1" to-layer="8" to-port="0"/>
</edges>
</net>"""

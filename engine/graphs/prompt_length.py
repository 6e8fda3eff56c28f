"""Denoisers that read a prompt of any length."""

from __future__ import annotations

from typing import Any

PROMPT = "encoder_hidden_states"
"""The denoiser's input (batch, tokens, width) that the prompt comes in by."""


def accept_any_prompt_length(graph: Any) -> None:
    """Let a denoiser take any number of tokens; an export fixes it at what one encoder reads."""
    import openvino as ov

    for port in graph.inputs:
        if PROMPT in port.get_names():
            shape = port.get_partial_shape()
            if len(shape) > 1 and shape[1].is_static:
                shape[1] = ov.Dimension(-1)
                graph.reshape({PROMPT: shape})

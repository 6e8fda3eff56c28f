"""
A diffusers model becomes OpenVINO IR, in a process of its own.

Tracing takes minutes and gigabytes, holds the interpreter's lock, warns, and prints. In a child
none of that touches the host: its memory comes back whole, and a crash is an error with a text.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import msgspec

from holdfast.engine.errors import ModelSourceError
from holdfast.engine.imports import heavy, quiet

_SILENT = {
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
}
_OFFLINE = {"HF_HUB_OFFLINE": "1"}


class Order(msgspec.Struct, frozen=True):
    """
    What is to be exported.

    Attributes:
        source: A diffusers folder or a single ``.safetensors`` file.
        pipeline: The diffusers class, for example ``"StableDiffusionPipeline"``.
        half: Write float16 constants. Right for a source that stores float16: nothing is lost then.
        variant: Infix of the weights' file names (``"fp16"``), where there are no others.
        config: For a single file, a folder with the configs and tokenizer of such a model; None
            lets diffusers fetch them from the hub.
    """

    source: str
    pipeline: str
    half: bool
    variant: str | None = None
    config: str | None = None


def export(order: Order, target: Path) -> None:
    """
    Write a model as OpenVINO IR, in the layout of ``optimum-cli export openvino``.

    Args:
        order: What to export.
        target: An existing folder. Holds an incomplete model where this raises.

    Raises:
        ModelSourceError: The export failed; the text ends with what the exporter said last.
    """
    if getattr(sys, "frozen", False) or not sys.executable:
        msg = (
            f"{order.source} must be exported to OpenVINO IR, which needs a Python interpreter "
            "beside this frozen application; export it beforehand with `holdfast export` and give "
            "the exported folder."
        )
        raise ModelSourceError(msg)
    environment = {
        **os.environ,
        **_SILENT,
        **(_OFFLINE if Path(order.source).is_dir() or order.config else {}),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-P", "-m", __name__, str(target)]
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(  # noqa: S603 - our own interpreter, on our own module
            command, stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment
        )
        assert child.stdin is not None  # noqa: S101 - tells the type checker what PIPE means
        try:
            # The pipe stays open: its end tells the child that nobody waits for it any more.
            with contextlib.suppress(BrokenPipeError):  # It has died already and left a text.
                child.stdin.write(msgspec.json.encode(order) + b"\n")
                child.stdin.flush()
            child.wait()
        finally:
            child.kill()
            child.stdin.close()
            child.wait()
        if child.returncode != 0:
            said.seek(0)
            raise ModelSourceError(_explain(order, child.returncode, said.read()))


def _explain(order: Order, code: int, said: bytes) -> str:
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    last = lines[-1].rstrip(".") if lines else "nothing"
    ended = f"was stopped by signal {-code}" if code < 0 else f"failed with exit code {code}"
    if order.source.endswith(".safetensors") and order.config is None:
        advice = (
            "A single file carries neither configs nor a tokenizer, and diffusers takes them from "
            "the hub. Let this machine reach the hub once, or put those of such a model "
            f"(model_index.json, unet/config.json, tokenizer/, ...) into the folder "
            f"{order.source.removesuffix('.safetensors')}."
        )
    else:
        advice = (
            "Check that the model is complete, that this diffusers can load it and that there is "
            "memory for it; or export it with `optimum-cli export openvino` and give the result."
        )
    return (
        f"{order.source} was to be exported to OpenVINO IR as {order.pipeline}, but the exporter "
        f"{ended}. It said last: {last}. {advice}"
    )


def _die_with_parent() -> None:
    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _main() -> None:
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    _die_with_parent()
    heavy()
    import diffusers
    import torch
    from optimum.exporters.openvino import export_from_model
    from optimum.intel import OVConfig

    pipeline_class: Any = getattr(diffusers, order.pipeline)
    # Traced in float32 whatever is stored: that loses nothing, and float16 has no CPU kernels for
    # some layers.
    settings: dict[str, Any] = {"torch_dtype": torch.float32, "safety_checker": None}
    with quiet():
        if order.source.endswith(".safetensors"):
            where = {"config": order.config, "local_files_only": True} if order.config else {}
            pipeline = pipeline_class.from_single_file(order.source, **where, **settings)
        else:
            pipeline = pipeline_class.from_pretrained(
                order.source,
                variant=order.variant,
                local_files_only=True,
                feature_extractor=None,
                requires_safety_checker=False,
                **settings,
            )
        export_from_model(
            pipeline,
            Path(sys.argv[1]),
            ov_config=OVConfig(dtype="fp16" if order.half else "fp32"),
        )


if __name__ == "__main__":
    _main()

"""
A diffusers model becomes OpenVINO IR, in a process of its own.

Tracing takes minutes and gigabytes, holds the interpreter's lock, warns, and prints. In a child
none of that touches the host: its memory comes back whole, and a crash is an error with a text.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.engine.child import ChildError, Progress, receive, run_child
from holdfast.engine.errors import Cancelled, ModelSourceError
from holdfast.engine.imports import heavy, quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from holdfast.states import Emit


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


def export(
    order: Order, target: Path, on_progress: Callable[[Progress], None] = lambda _: None
) -> None:
    """
    Write a model as OpenVINO IR, in the layout of ``optimum-cli export openvino``.

    Args:
        order: What to export.
        target: An existing folder. Holds an incomplete model where this raises.
        on_progress: Told of each phase as it begins.

    Raises:
        ModelSourceError: The export failed; the text ends with what the exporter said last.
        Cancelled: The job that this is done for was asked to stop.
    """
    offline = Path(order.source).is_dir() or order.config is not None
    try:
        run_child(__name__, order, target, offline=offline, on_progress=on_progress)
    except ChildError as error:
        raise ModelSourceError(_explain(order, error)) from error


@contextlib.contextmanager
def export_told(
    source: str, fingerprint: str, target: Path, emit: Emit
) -> Iterator[Callable[[Progress], None]]:
    """
    Log how the making of OpenVINO IR begins, how far it has come, and how it ends.

    Args:
        source: What it is made of, for a person.
        fingerprint: Of what is made, as the cache names it.
        target: The folder that it is written into.
        emit: Told ``export.started``, ``export.progress``, and ``export.completed``,
            ``export.failed`` or ``export.cancelled``.

    Yields:
        What the log's progress is told with.
    """
    facts: dict[str, Any] = {"source": source, "fingerprint": fingerprint}

    def tell(progress: Progress) -> None:
        emit("export.progress", level="debug", **facts, **msgspec.structs.asdict(progress))

    emit("export.started", **facts)
    began = time.perf_counter()
    try:
        yield tell
    except Cancelled:
        emit("export.cancelled", level="warning", seconds=time.perf_counter() - began, **facts)
        raise
    except BaseException as error:
        facts["error"] = f"{type(error).__name__}: {error}"
        emit("export.failed", level="error", seconds=time.perf_counter() - began, **facts)
        raise
    facts["bytes"] = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    emit("export.completed", seconds=time.perf_counter() - began, **facts)


def _explain(order: Order, error: ChildError) -> str:
    if error.frozen:
        return (
            f"{order.source} must be exported to OpenVINO IR, which needs a Python interpreter "
            "beside this frozen application; export it beforehand with `holdfast export` and give "
            "the exported folder."
        )
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
        f"{error}. {advice}"
    )


def _main() -> None:
    order, tell = receive(Order)
    tell(Progress("load", 0, 2))
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
        tell(Progress("convert", 1, 2))
        export_from_model(
            pipeline,
            Path(sys.argv[1]),
            ov_config=OVConfig(dtype="fp16" if order.half else "fp32"),
        )


if __name__ == "__main__":
    _main()

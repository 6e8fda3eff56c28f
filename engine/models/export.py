"""
A diffusers model becomes OpenVINO IR, in a process of its own.

Tracing takes minutes and gigabytes, holds the interpreter's lock, warns, and prints. In a child
none of that touches the host: its memory comes back whole, and a crash is an error with a text.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.engine.errors import Cancelled, ModelSourceError
from holdfast.engine.imports import heavy, quiet
from holdfast.engine.logbook.events import error_words
from holdfast.engine.models.checkpoint import (
    UNET,
    VAE,
    check_complete,
    check_loaded,
    check_taken,
    load_checkpoint,
)
from holdfast.engine.models.child_process import ChildError, Progress, receive, run_child
from holdfast.engine.models.configs import read_index
from holdfast.engine.models.families import VAE_DECODER, VAE_ENCODER
from holdfast.engine.requests.told import told_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from holdfast.states import Emit


class Order(msgspec.Struct, frozen=True):
    """
    What is to be exported.

    Attributes:
        source: A diffusers folder or a single ``.safetensors`` file.
        pipeline: The diffusers class, for example ``"StableDiffusionPipeline"``; or `LONE_VAE`.
        half: Write float16 constants. Right for a source that stores float16: nothing is lost then.
        variant: Infix of the weights' file names (``"fp16"``), where there are no others.
        config: For a single file, a folder with the configs and tokenizer of such a model; None
            lets diffusers fetch them from the hub.
        scheduler: Settings over those of the configuration, that a single file carries itself.
    """

    source: str
    pipeline: str
    half: bool
    variant: str | None = None
    config: str | None = None
    scheduler: dict[str, Any] = msgspec.field(default_factory=dict)


LONE_VAE = "AutoencoderKL"


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
    facts: dict[str, Any] = {"source": told_path(source), "fingerprint": fingerprint}

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
        facts["error"] = error_words(error)
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
    if error.failure is not None and error.failure.kind == ModelSourceError.__name__:
        return f"{order.source} cannot be used as {order.pipeline}: {error.failure.text}."
    if error.lacked_memory:
        advice = "Check that there is memory for it."
    elif order.source.endswith(".safetensors") and order.config is None:
        advice = (
            "A single file carries neither configs nor a tokenizer, and diffusers takes them from "
            "the hub. Let this machine reach the hub once, or put those of such a model "
            f"(model_index.json, unet/config.json, tokenizer/, ...) into the folder "
            f"{order.source.removesuffix('.safetensors')}."
        )
    else:
        advice = (
            "Check that the model is complete and that this diffusers can load it; or export it "
            "with `optimum-cli export openvino` and give the result."
        )
    return (
        f"{order.source} was to be exported to OpenVINO IR as {order.pipeline}, but the exporter "
        f"{error}. {advice}"
    )


def _main() -> None:
    order, tell = receive(Order)
    tell(Progress("load", 0, 2))
    heavy()
    with quiet():
        _refuse_gaps()
        target = Path(sys.argv[1])
        if order.pipeline == LONE_VAE:
            vae = _load_vae(order)
            tell(Progress("convert", 1, 2))
            _write_vae(vae, target, order)
            return
        pipeline = _load_pipeline(order)
        _bound_prompts(pipeline)
        tell(Progress("convert", 1, 2))
        from optimum.exporters.openvino import export_from_model

        export_from_model(pipeline, target, ov_config=_written_as(order))


def _written_as(order: Order) -> Any:
    from optimum.intel import OVConfig

    return OVConfig(dtype="fp16" if order.half else "fp32")


def _refuse_gaps() -> None:
    """Have the libraries refuse weights that lack some, which they draw at random or leave out."""
    import diffusers
    import transformers
    from diffusers.loaders import single_file_model, single_file_utils

    for kind in (diffusers.ModelMixin, transformers.PreTrainedModel):
        kind.from_pretrained = classmethod(check_loaded(kind.from_pretrained.__func__))
    for module in (single_file_model, single_file_utils):
        fill = getattr(module, "load_model_dict_into_meta", None)  # None without accelerate
        if fill is not None:
            module.load_model_dict_into_meta = check_complete(fill)


def _load_pipeline(order: Order) -> Any:
    """Load in float32 whatever is stored: that loses nothing, and float16 has no CPU kernels."""
    import diffusers
    import torch

    pipeline_class: Any = getattr(diffusers, order.pipeline)
    settings: dict[str, Any] = {"torch_dtype": torch.float32, "safety_checker": None}
    if not order.source.endswith(".safetensors"):
        index = read_index(Path(order.source) / "model_index.json")
        # diffusers wants to be told of what a model does without, such as SD3's T5.
        absent = {name: None for name, entry in index.items() if entry == [None, None]}
        return pipeline_class.from_pretrained(
            order.source,
            variant=order.variant,
            local_files_only=True,
            requires_safety_checker=False,
            **absent | settings | {"feature_extractor": None},
        )
    from diffusers.loaders import single_file

    weights = load_checkpoint(order.source)
    counts = {name: each.numel() for name, each in weights.items()}
    # What diffusers would read from the file itself is read already: its reader knows neither
    # scales nor older names.
    single_file.load_single_file_checkpoint = lambda *_, **__: weights
    where = {"config": order.config, "local_files_only": True} if order.config else {}
    pipeline = pipeline_class.from_single_file(order.source, **where, **settings)
    check_taken(counts, {UNET: pipeline.unet, VAE: pipeline.vae})
    if order.scheduler:
        known = type(pipeline.scheduler)
        pipeline.scheduler = known.from_config(pipeline.scheduler.config, **order.scheduler)
    return pipeline


def _bound_prompts(pipeline: Any) -> None:
    """Have no tokenizer hand on more than its text encoder reads; some do not say how much."""
    for name in [each for each in pipeline.components if each.startswith("tokenizer")]:
        tokenizer = getattr(pipeline, name)
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"), None)
        readable = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if tokenizer is not None and readable is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, readable)


def _load_vae(order: Order) -> Any:
    import diffusers
    import torch

    settings: dict[str, Any] = {"torch_dtype": torch.float32, "local_files_only": True}
    if order.source.endswith(".safetensors"):
        return diffusers.AutoencoderKL.from_single_file(
            order.source, config=order.config, subfolder="vae", **settings
        )
    return diffusers.AutoencoderKL.from_pretrained(order.source, variant=order.variant, **settings)


def _write_vae(vae: Any, target: Path, order: Order) -> None:
    """Write both halves of a VAE, as the export of a whole model does."""
    from optimum.exporters.openvino.convert import export_models
    from optimum.exporters.tasks import TasksManager

    encoder, decoder = copy.deepcopy(vae), copy.deepcopy(vae)
    encoder.forward = lambda sample: {
        "latent_parameters": encoder.encode(x=sample)["latent_dist"].parameters
    }
    decoder.forward = lambda latent_sample: decoder.decode(z=latent_sample)
    halves = {}
    for name, half in ((VAE_ENCODER, encoder), (VAE_DECODER, decoder)):
        made = TasksManager.get_exporter_config_constructor(
            model=half,
            exporter="openvino",
            library_name="diffusers",
            task="semantic-segmentation",
            model_type=name.replace("_", "-"),
        )
        halves[name] = (half, made(half.config, int_dtype="int64", float_dtype="fp32"))
    export_models(
        models_and_export_configs=halves,
        output_dir=target,
        output_names=[f"{name}/openvino_model.xml" for name in halves],
        ov_config=_written_as(order),
        stateful=False,
        library_name="diffusers",
    )
    for name in halves:
        vae.save_config(target / name)
    (target / "model_index.json").write_text(json.dumps({"_class_name": LONE_VAE}))


if __name__ == "__main__":
    _main()

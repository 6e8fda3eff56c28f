"""
From what a host names as its model to a checked folder of OpenVINO IR with fingerprints.

A name is ``"demo"``, a folder of OpenVINO IR, a diffusers folder, a hub id or one ``.safetensors``
file. What is not IR is exported once into the cache, under the fingerprint of its source.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from holdfast.engine import hub
from holdfast.engine.diskcache import Costs, build_once, discard
from holdfast.engine.errors import ModelSourceError
from holdfast.engine.export import Order, export, export_told
from holdfast.engine.families import family_of
from holdfast.engine.integrity import Digests, check_ir, read_json, safetensors_dtypes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from holdfast.states import Emit

INDEX = "model_index.json"
GRAPH = "openvino_model.xml"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PARTS = {"vae_decoder": "vae", "vae_encoder": "vae"}
_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
_CHECKPOINT = ("cond_stage_model.", "conditioner.", "first_stage_model.", "model.diffusion_model.")


@dataclass(frozen=True)
class ModelFolder:
    """
    A complete model as OpenVINO IR, with what identifies it.

    Attributes:
        path: The folder, as ``optimum-cli export openvino`` writes one.
        fingerprint: Digest of everything that shapes an image: graphs, weights, tokenizers,
            configs. Stays the same when the folder is copied or moved.
        config: ``model_index.json``, parsed.
        component_fingerprints: The same for each component alone (``"unet"``, ``"vae_decoder"``,
            ...): its graph, weights and config.
    """

    path: Path
    fingerprint: str
    config: Mapping[str, Any] = field(repr=False)
    component_fingerprints: Mapping[str, str] = field(repr=False)

    @property
    def class_name(self) -> str:
        """The pipeline class, for example ``"StableDiffusionPipeline"``."""
        return str(self.config["_class_name"])

    def component_path(self, name: str) -> Path:
        """Return the graph of a component, for example ``unet/openvino_model.xml``."""
        return self.path / name / GRAPH

    def component_fingerprint(self, name: str) -> str:
        """Return the digest of one component's graph, weights and config."""
        return self.component_fingerprints[name]

    def component_config(self, name: str) -> dict[str, Any]:
        """Return a component's ``config.json``, parsed."""
        return read_json(self.path / name / "config.json")


@dataclass(frozen=True)
class Missing:
    """
    A model that is not here as OpenVINO IR yet.

    Attributes:
        needs: ``"download"`` (an export may follow, which is known then) or ``"export"``.
        class_name: The pipeline class; empty where the model must be downloaded to know.
        seconds: That such an export took before; None where there is nothing to go by.
    """

    needs: Literal["download", "export"]
    class_name: str = ""
    seconds: float | None = None


def missing(model: str | Path, cache_dir: Path, emit: Emit) -> Missing | None:
    """
    Tell what `resolve` would have to do first; nothing is downloaded or exported here.

    Args:
        model: As for `resolve`.
        cache_dir: As for `resolve`.
        emit: Told ``cache.discarded``.

    Raises:
        ModelSourceError: There is no such model, or it is incomplete, damaged or not supported.
    """
    cache_dir = cache_dir.expanduser().resolve()
    with _file_errors(model, cache_dir):
        found = _present(model, None)
        if found is None:
            return Missing("download")
        ordered = _ordered(found, Digests(cache_dir / "digests.json", emit))
    if ordered is None:
        return None
    order, fingerprint = ordered
    target = cache_dir / "exports" / fingerprint
    if target.is_dir():
        with contextlib.suppress(ModelSourceError):
            _check(target, _index(target))
            return None
    known = Costs(cache_dir / "costs.json", emit).expected(*_export_cost(order))
    return Missing("export", order.pipeline, None if known is None else known.seconds)


def resolve(
    model: str | Path, cache_dir: Path, emit: Emit, *, revision: str | None = None
) -> ModelFolder:
    """
    Find a model, export it to OpenVINO IR where it is not, and check that it is whole.

    Args:
        model: ``"demo"``, a folder of OpenVINO IR or of diffusers, a ``.safetensors`` file, or an
            id on the Hugging Face hub. One that was downloaded once is used as it is.
        cache_dir: Holds exports and file digests; shared by processes. Made if it is not there.
        emit: Told ``download.*``, ``export.*``, ``cache.discarded`` and ``model.resolved``.
        revision: Branch, tag or commit of a hub id; None is its default branch.

    Raises:
        ModelSourceError: There is no such model, it is incomplete, damaged, not supported, cannot
            be downloaded or exported, or `cache_dir` cannot be written.
    """
    cache_dir = cache_dir.expanduser().resolve()
    digests = Digests(cache_dir / "digests.json", emit)
    with _file_errors(model, cache_dir):
        found = _locate(model, revision, emit)
        ordered = _ordered(found, digests)
        folder = found if ordered is None else _exported(*ordered, cache_dir, emit)
        resolved = _identified(folder, digests)
    emit(
        "model.resolved",
        model=str(model),
        fingerprint=resolved.fingerprint,
        pipeline=resolved.class_name,
        path=str(resolved.path),
    )
    return resolved


@contextlib.contextmanager
def _file_errors(model: str | Path, cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = (
            f"{model} was to be resolved with the cache in {cache_dir}, but a file could not be "
            f"read or written ({error}). Check permissions and free space, or give another "
            "cache_dir."
        )
        raise ModelSourceError(msg) from error


def _locate(model: str | Path, revision: str | None, emit: Emit) -> Path:
    present = _present(model, revision)
    if present is None:
        present = hub.download(str(model), revision, emit)
        _check_source(present)
    return present


def _present(model: str | Path, revision: str | None) -> Path | None:
    """Return where a model lies; None where it must be downloaded."""
    if model == "demo":
        from holdfast.engine import demo

        return demo.model_folder()
    path = Path(model).expanduser().resolve()
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if path.is_file():
        msg = (
            f"{path} was given as the model, but a single file must be .safetensors. Give such a "
            "file, a folder, or a hub id (owner/name)."
        )
        raise ModelSourceError(msg)
    if isinstance(model, str) and _HUB_ID.fullmatch(model):
        with contextlib.suppress(ModelSourceError):
            present = hub.downloaded(model, revision)
            _check_source(present)
            return present
        return None
    msg = (
        f"{model} was given as the model, but there is no such folder or file. Give a folder of "
        "OpenVINO IR or diffusers, a .safetensors file, a hub id (owner/name), or 'demo'."
    )
    raise ModelSourceError(msg)


def _check_source(folder: Path) -> None:
    """Raise where a downloaded folder lacks a part: an interrupted download leaves such."""
    config = _index(folder)
    if any(folder.glob(f"*/{GRAPH}")):
        _check(folder, config)
    else:
        for part in _parts(config):
            _weights(folder, part)


def _ordered(found: Path, digests: Digests) -> tuple[Order, str] | None:
    """Return how to export a model, and what the result is known by; None where it is IR."""
    if found.is_file():
        return _order_for_file(found, digests)
    if any(found.glob(f"*/{GRAPH}")):
        return None
    return _order_for_folder(found, digests)


def _order_for_folder(source: Path, digests: Digests) -> tuple[Order, str]:
    config = _index(source)
    weights = [_weights(source, part) for part in _parts(config)]
    files = [file for found, _ in weights for file in found]
    variants = {variant for _, variant in weights if variant}
    headers = [safetensors_dtypes(file) for file in files if file.suffix == ".safetensors"]
    order = Order(
        source=str(source),
        pipeline=config["_class_name"],
        half=len(headers) == len(files)
        and _in_half(dtype for header in headers for dtype in header.values()),
        variant=variants.pop() if variants else None,
    )
    return order, digests.of([*_texts(source, config), *files], source)


def _order_for_file(source: Path, digests: Digests) -> tuple[Order, str]:
    dtypes = {
        name: dtype
        for name, dtype in safetensors_dtypes(source).items()
        if name.startswith(_CHECKPOINT)
    }
    missing = [
        what
        for what, prefixes in (
            ("a text encoder", _CHECKPOINT[:2]),
            ("a VAE", _CHECKPOINT[2]),
            ("a UNet", _CHECKPOINT[3]),
        )
        if not any(name.startswith(prefixes) for name in dtypes)
    ]
    if missing:
        msg = (
            f"{source} was given as a whole model, but holds no weights of {' or '.join(missing)}. "
            "Give a Stable Diffusion checkpoint; a LoRA goes into `lora`."
        )
        raise ModelSourceError(msg)
    files = [source]
    beside = next(
        (place for place in (source.with_suffix(""), source.parent) if (place / INDEX).is_file()),
        None,
    )
    if beside is None:
        larger = any(name.startswith("conditioner.") for name in dtypes)
        pipeline = "StableDiffusionXLPipeline" if larger else "StableDiffusionPipeline"
    else:
        config = _index(beside)
        pipeline = config["_class_name"]
        files += _texts(beside, config)
    order = Order(
        source=str(source),
        pipeline=pipeline,
        half=_in_half(dtypes.values()),
        config=str(beside) if beside else None,
    )
    return order, digests.of(files, source.parent)


def _exported(order: Order, fingerprint: str, cache_dir: Path, emit: Emit) -> Path:
    target = cache_dir / "exports" / fingerprint
    if target.is_dir():
        try:
            _check(target, _index(target))
        except ModelSourceError as damage:
            discard(target)
            emit("cache.discarded", level="warning", entry=target.name, why=str(damage))

    def build(scratch: Path) -> None:
        with export_told(order.source, fingerprint, scratch, emit) as tell:
            began = time.perf_counter()
            export(order, scratch, tell)
            _check(scratch, _index(scratch))
            seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
        costs = Costs(cache_dir / "costs.json", emit)
        costs.record(*_export_cost(order), seconds=seconds, bytes=size)

    build_once(target, build)
    return target


def _export_cost(order: Order) -> tuple[str, str, str, str]:
    return "export", "CPU", order.pipeline, "half" if order.half else "full"


def _identified(folder: Path, digests: Digests) -> ModelFolder:
    config = _index(folder)
    fingerprints = {
        name: digests.of(
            [folder / name / file for file in (GRAPH, "openvino_model.bin", "config.json")],
            folder / name,
        )
        for name in _check(folder, config)
    }
    whole = (digests.of(_texts(folder, config), folder), *sorted(fingerprints.items()))
    fingerprint = hashlib.sha256(repr(whole).encode()).hexdigest()[:32]
    return ModelFolder(folder, fingerprint, config, fingerprints)


def _check(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of an IR folder's components, each of them whole."""
    names = family_of(config["_class_name"]).all_components
    for name in names:
        check_ir(folder / name / GRAPH)
    return names


def _parts(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the folders of a diffusers model that hold weights which Holdfast runs."""
    names = family_of(config["_class_name"]).all_components
    return tuple(dict.fromkeys(_PARTS.get(name, name) for name in names))


def _weights(source: Path, part: str) -> tuple[list[Path], str | None]:
    """Return the files with a part's weights, and the variant (``"fp16"``) in their names."""
    folder = source / part
    read_json(folder / "config.json")
    for suffix in ("safetensors", "bin"):
        for variant in (None, "fp16"):
            infix = f".{variant}" if variant else ""
            for stem in _WEIGHTS:
                single = folder / f"{stem}{infix}.{suffix}"
                shards = folder / f"{stem}.{suffix}.index{infix}.json"
                if single.is_file():
                    return [single], variant
                if shards.is_file():
                    names = sorted(set(read_json(shards)["weight_map"].values()))
                    return [folder / name for name in names], variant
    msg = (
        f"{folder} holds no weights (.safetensors or .bin): the diffusers folder is incomplete. "
        "Copy or download the model again."
    )
    raise ModelSourceError(msg)


def _texts(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """Return the configs and tokenizer files of every part that a model's index names."""
    named = [
        name
        for name, entry in config.items()
        if isinstance(entry, list) and entry[0] is not None and name != "safety_checker"
    ]
    kinds = ("*.json", "*.txt", "*.model")
    files = (
        file for name in sorted(named) for kind in kinds for file in (folder / name).glob(kind)
    )
    return [folder / INDEX, *sorted(files)]


def _in_half(dtypes: Iterable[str]) -> bool:
    """Tell whether all weights are stored as float16; integers beside them do not count."""
    return {dtype for dtype in dtypes if dtype.startswith(("F", "BF"))} == {"F16"}


def _index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        msg = (
            f"{folder} was given as the model, but holds no {INDEX}: it is neither a diffusers "
            "folder nor a diffusion model in OpenVINO IR. Give the folder that holds that file."
        )
        raise ModelSourceError(msg)
    config = read_json(path)
    family_of(str(config.get("_class_name")))
    return config

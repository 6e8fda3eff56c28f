"""
From what a host names as its model to a checked folder of OpenVINO IR with a fingerprint.

A name may be ``"demo"``, a folder of OpenVINO IR, a diffusers folder, a hub id or one
``.safetensors`` file; what is not IR is exported once into the cache.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.engine import diskcache
from holdfast.engine.errors import ModelSourceError
from holdfast.engine.export import Order, export

if TYPE_CHECKING:
    from collections.abc import Iterable

    from holdfast.states import Emit

SUPPORTED = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "LatentConsistencyModelPipeline",
)
"""Classes of ``model_index.json`` that can be resolved."""

_INDEX = "model_index.json"
_GRAPH = "openvino_model.xml"
_EXPORTED_AS = {"vae": ("vae_decoder", "vae_encoder")}
_MODELS = ("text_encoder", "text_encoder_2", "unet", "vae")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CONSTANT = re.compile(rb'<data [^>]*?offset="(\d+)" size="(\d+)"')
_PADDING = 4096  # What a writer may align the end of a .bin to.
_TEXTS = ("*.json", "*.txt", "*.model")


@dataclass(frozen=True)
class ModelFolder:
    """
    A complete model as OpenVINO IR, with what identifies it.

    Attributes:
        path: The folder, as ``optimum-cli export openvino`` writes one.
        fingerprint: Digest of everything that shapes an image: graphs, weights, tokenizers,
            configs. Stays the same when the folder is copied or moved.
        config: ``model_index.json``, parsed.
        component_fingerprints: The same digest for each component alone (``"unet"``,
            ``"vae_decoder"``, ...): graph, weights and config.
    """

    path: Path
    fingerprint: str
    config: Mapping[str, Any] = field(repr=False)
    component_fingerprints: Mapping[str, str] = field(repr=False)

    @property
    def class_name(self) -> str:
        """The diffusers pipeline, for example ``"StableDiffusionPipeline"``."""
        return str(self.config["_class_name"])

    def component_path(self, name: str) -> Path:
        """Return the graph of a component, for example ``unet/openvino_model.xml``."""
        return self.path / name / _GRAPH

    def component_fingerprint(self, name: str) -> str:
        """Return the digest of one component's graph, weights and config."""
        return self.component_fingerprints[name]

    def component_config(self, name: str) -> dict[str, Any]:
        """Return a component's ``config.json``, parsed."""
        return _read_json(self.path / name / "config.json")


def resolve(
    model: str | Path, cache_dir: Path, emit: Emit, *, revision: str | None = None
) -> ModelFolder:
    """
    Find a model, export it to OpenVINO IR where it is not, and check that it is whole.

    Args:
        model: ``"demo"``, a folder of OpenVINO IR or of diffusers, a ``.safetensors`` file, or an
            id on the Hugging Face hub.
        cache_dir: Holds exports and file digests; shared by processes. Made if it is not there.
        emit: Told ``export.*``, ``download.*``, ``cache.discarded`` and ``model.resolved``.
        revision: Branch, tag or commit of a hub id; the default branch where None.

    Raises:
        ModelSourceError: There is no such model, it is incomplete, damaged, not supported, cannot
            be downloaded or exported, or `cache_dir` cannot be written.
    """
    try:
        found = _locate(model, emit, revision)
        digests = _Digests(cache_dir, emit)
        if found.is_dir() and any(found.glob(f"*/{_GRAPH}")):
            folder = found
        elif found.is_dir():
            folder = _export_folder(found, cache_dir, digests, emit)
        else:
            folder = _export_file(found, cache_dir, digests, emit)
        resolved = _identify(folder, digests)
    except OSError as error:
        msg = (
            f"{model} was to be resolved with the cache in {cache_dir}, but a file could not be "
            f"read or written ({error}). Check permissions and free space, or give another "
            "cache_dir."
        )
        raise ModelSourceError(msg) from error
    emit(
        "model.resolved",
        model=str(model),
        fingerprint=resolved.fingerprint,
        pipeline=resolved.class_name,
        path=str(resolved.path),
    )
    return resolved


def _locate(model: str | Path, emit: Emit, revision: str | None) -> Path:
    if model == "demo":
        from holdfast.engine import demo

        return demo.model_folder()
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        if path.suffix != ".safetensors":
            msg = (
                f"{path} was given as the model, but a single file must be .safetensors. Give such "
                "a file, a folder, or a hub id."
            )
            raise ModelSourceError(msg)
        return path.resolve()
    if isinstance(model, str) and _HUB_ID.fullmatch(model):
        return _download(model, emit, revision)
    msg = (
        f"{model} was given as the model, but there is no such folder or file. Give a folder of "
        "OpenVINO IR or diffusers, a .safetensors file, a hub id (owner/name), or 'demo'."
    )
    raise ModelSourceError(msg)


def _download(model: str, emit: Emit, revision: str | None) -> Path:
    del emit, revision

    raise NotImplementedError


def _export_folder(source: Path, cache_dir: Path, digests: _Digests, emit: Emit) -> Path:
    config = _read_index(source)
    files = [source / _INDEX]
    weights: list[Path] = []
    variant = None
    for part in _wanted(config):
        found, infix = _weights(source, part)
        weights += found
        variant = variant or infix
    for part in sorted(part for part, entry in config.items() if _is_part(entry)):
        files += sorted(path for kind in _TEXTS for path in (source / part).glob(kind))
    headers = [safetensors_header(path) for path in weights if path.suffix == ".safetensors"]
    order = Order(
        source=str(source),
        pipeline=config["_class_name"],
        half=len(headers) == len(weights) and stored_in_half(headers),
        variant=variant,
    )
    fingerprint = digests.of([*files, *weights], source)
    return _export(order, fingerprint, cache_dir, emit)


def _export_file(source: Path, cache_dir: Path, digests: _Digests, emit: Emit) -> Path:
    raise NotImplementedError


def _export(order: Order, fingerprint: str, cache_dir: Path, emit: Emit) -> Path:
    target = cache_dir / "exports" / fingerprint
    if target.is_dir():
        try:
            _check(target, _read_index(target))
        except ModelSourceError as damage:
            diskcache.discard(target)
            emit("cache.discarded", level="warning", entry=target.name, why=str(damage))

    def build(scratch: Path) -> None:
        facts: dict[str, Any] = {"source": order.source, "fingerprint": fingerprint}
        emit("export.started", **facts)
        began = time.perf_counter()
        try:
            export(order, scratch)
            _check(scratch, _read_index(scratch))
        except BaseException as error:
            seconds = round(time.perf_counter() - began, 3)
            text = f"{type(error).__name__}: {error}"
            emit("export.failed", level="error", error=text, seconds=seconds, **facts)
            raise
        size = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
        seconds = round(time.perf_counter() - began, 3)
        emit("export.completed", bytes=size, seconds=seconds, **facts)

    diskcache.build_once(target, build)
    return target


def _identify(folder: Path, digests: _Digests) -> ModelFolder:
    config = _read_index(folder)
    components = _check(folder, config)
    fingerprints = {
        name: digests.of(
            [
                folder / name / file
                for file in (_GRAPH, "openvino_model.bin", "config.json")
                if (folder / name / file).exists()
            ],
            folder / name,
        )
        for name in components
    }
    rest = [folder / _INDEX]
    for part in sorted(part for part, entry in config.items() if _is_part(entry)):
        rest += sorted(path for kind in _TEXTS for path in (folder / part).glob(kind))
    whole = "".join(
        [digests.of(rest, folder), *(fingerprints[name] for name in sorted(components))]
    )
    return ModelFolder(
        folder, hashlib.sha256(whole.encode()).hexdigest()[:32], config, fingerprints
    )


def _check(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a folder's components, each of them whole."""
    names = tuple(name for part in _wanted(config) for name in _EXPORTED_AS.get(part, (part,)))
    for name in names:
        check_ir(folder / name / _GRAPH)
    return names


def check_ir(graph: Path) -> None:
    """
    Check cheaply that a graph and its weights are there, whole, and of one size.

    Raises:
        ModelSourceError: The ``.xml`` or ``.bin`` is missing or cut, or the ``.bin`` is not as long
            as the graph's constants say.
    """
    weights = graph.with_suffix(".bin")
    for path in (graph, weights):
        if not path.is_file():
            msg = (
                f"{path} is missing: the OpenVINO model is incomplete. Copy or export the model "
                "again."
            )
            raise ModelSourceError(msg)
    text = graph.read_bytes()
    if not text.rstrip().endswith(b"</net>"):
        msg = f"{graph} ends in the middle: it was cut. Copy or export the model again."
        raise ModelSourceError(msg)
    needed = max((int(start) + int(size) for start, size in _CONSTANT.findall(text)), default=0)
    size = weights.stat().st_size
    if not needed <= size <= needed + _PADDING:
        msg = (
            f"{weights} has {size} bytes, but the constants of {graph.name} need {needed}: it was "
            "cut, or belongs to another graph. Copy or export the model again."
        )
        raise ModelSourceError(msg)


def _weights(source: Path, part: str) -> tuple[list[Path], str | None]:
    """Return the files that hold a part's weights, and the variant infix in their names."""
    folder = source / part
    if not (folder / "config.json").is_file():
        msg = f"{folder / 'config.json'} is missing: the diffusers folder is incomplete."
        raise ModelSourceError(msg)
    for suffix in ("safetensors", "bin"):
        for infix in (None, "fp16"):
            middle = f".{infix}" if infix else ""
            for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
                single = folder / f"{stem}{middle}.{suffix}"
                index = folder / f"{stem}.{suffix}.index{middle}.json"
                if single.is_file():
                    return [single], infix
                if index.is_file():
                    shards = sorted(
                        {folder / name for name in _read_json(index)["weight_map"].values()}
                    )
                    return shards, infix
    msg = f"{folder} holds no weights (.safetensors or .bin): the diffusers folder is incomplete."
    raise ModelSourceError(msg)


def _wanted(config: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(part for part in _MODELS if _is_part(config.get(part)))


def _is_part(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / _INDEX
    if not path.is_file():
        msg = (
            f"{folder} was given as the model, but holds no {_INDEX}, so it is neither a diffusers "
            "folder nor a diffusion model in OpenVINO IR. Give the folder that holds it."
        )
        raise ModelSourceError(msg)
    config = _read_json(path)
    if config.get("_class_name") not in SUPPORTED:
        msg = (
            f"{folder} is a {config.get('_class_name')}, which is not supported. Supported are: "
            f"{', '.join(SUPPORTED)}."
        )
        raise ModelSourceError(msg)
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, FileNotFoundError) as error:
        msg = f"{path} cannot be read as JSON ({error}). Copy or export the model again."
        raise ModelSourceError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path} does not hold a JSON object. Copy or export the model again."
        raise ModelSourceError(msg)
    return content


class _Digests:
    """Digests of files, remembered by path, size and time of change: gigabytes are read once."""

    def __init__(self, cache_dir: Path, emit: Emit) -> None:
        self._ledger = diskcache.Ledger(
            cache_dir / "digests.json", tuple[int, int, str], limit=4096, emit=emit
        )

    def of(self, files: Iterable[Path], folder: Path) -> str:
        """Return the digest of some files of a folder: their names in it and their contents."""
        known = self._ledger.read()
        learned = {}
        whole = hashlib.sha256()
        for file in files:
            status = file.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            entry = known.get(str(file))
            if entry is None or entry[:2] != stamp:
                entry = learned[str(file)] = (*stamp, _digest(file))
            whole.update(f"{file.relative_to(folder).as_posix()} {entry[2]}\n".encode())
        if learned:
            self._ledger.update(
                {key: lambda _, value=value: value for key, value in learned.items()}
            )
        return whole.hexdigest()[:32]


def _digest(file: Path) -> str:
    if file.suffix == ".json":
        content = json.loads(file.read_bytes())
        if isinstance(content, dict):
            content.pop("_name_or_path", None)  # Where it was once saved, not what it is.
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def stored_in_half(headers: list[dict[str, Any]]) -> bool:
    """Tell from safetensors headers whether every floating-point weight is stored as float16."""
    kinds = {
        entry["dtype"]
        for header in headers
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"].startswith(("F", "BF"))
    }
    return kinds == {"F16"}


def safetensors_header(path: Path) -> dict[str, Any]:
    """
    Read what a safetensors file says it holds: name -> dtype, shape, data_offsets.

    Raises:
        ModelSourceError: The file is cut, or is not safetensors.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(min(length, size)))
        ends = [
            entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        msg = (
            f"{path} was to be read as safetensors weights, but is not a safetensors file or is "
            f"damaged ({error}). Download or copy it again."
        )
        raise ModelSourceError(msg) from error
    needed = 8 + length + max(ends, default=0)
    if size != needed:
        msg = (
            f"{path} should be {needed} bytes long by its own header, but has {size}: it is "
            "damaged. Download or copy it again."
        )
        raise ModelSourceError(msg)
    return header

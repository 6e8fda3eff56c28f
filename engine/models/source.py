"""
From what a host names as its model to a checked folder of OpenVINO IR with fingerprints.

A name is ``"demo"``, a folder of OpenVINO IR, a diffusers folder, a hub id or one ``.safetensors``
file. What is not IR is exported once into the cache, under the fingerprint of its source.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from holdfast.engine.errors import ModelSourceError
from holdfast.engine.models import hub
from holdfast.engine.models.atomic_files import discard
from holdfast.engine.models.checkpoint import check_lone_vae, is_whole, read_checkpoint
from holdfast.engine.models.configs import Config, read_config, read_index, read_vae
from holdfast.engine.models.diskcache import build_once
from holdfast.engine.models.export import LONE_VAE, Order, export, export_told
from holdfast.engine.models.families import VAE_DECODER, VAE_ENCODER, family_of, refuse
from holdfast.engine.models.integrity import Digests, check_ir, check_pickle, read_header, read_json
from holdfast.engine.models.ledger import Costs
from holdfast.engine.models.weights import choose, missing_weights
from holdfast.engine.requests.told import told_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from holdfast.engine.models.families import Family
    from holdfast.states import Emit

Role = Literal["model", "vae"]
"""The setting that names a model: of ``vae`` only the VAE is used, and nothing else is needed."""

INDEX = "model_index.json"
GRAPH = "openvino_model.xml"
WEIGHTS = "openvino_model.bin"
CONFIG = "config.json"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_VAE = (VAE_DECODER, VAE_ENCODER)
_PARTS = dict.fromkeys(_VAE, "vae")


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
            ...): its graph, weights and config. A component that an older export lacks, and that
            some mode can do without, is not among them.
        stamps: Of the files that each component was identified by: what changes with them.
    """

    path: Path
    fingerprint: str
    config: Mapping[str, Any] = field(repr=False)
    component_fingerprints: Mapping[str, str] = field(repr=False)
    stamps: Mapping[str, Stamp] = field(repr=False, compare=False, default_factory=dict)

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
        return read_json(self.path / name / CONFIG)

    @property
    def is_unchanged(self) -> bool:
        """Whether every component's files are still those that it was identified by."""
        return all(stamp_of(self.path / name) == stamp for name, stamp in self.stamps.items())

    def check_unchanged(self, name: str) -> None:
        """
        Make sure, right before a component is read, that it is what was identified.

        Raises:
            ModelSourceError: Its files were replaced, changed or removed since.
        """
        if name in self.stamps and stamp_of(self.path / name) != self.stamps[name]:
            msg = (
                f"{self.path / name} was changed while the engine was at work on it. Ask again, to "
                "use what is there now."
            )
            raise ModelSourceError(msg)

    @property
    def is_overwritten(self) -> bool:
        """
        Whether weights were written into, so that nothing that has them mapped may run.

        A file that was replaced or removed stays mapped as it was; one that was cut ends the
        process that reads what is missing.
        """
        return any(self._is_overwritten(name) for name in self.stamps)

    def check_mapped(self, name: str) -> None:
        """
        Make sure that a component's weights, where they are mapped, are what was identified.

        Raises:
            ModelSourceError: Their file was written into.
        """
        if self._is_overwritten(name):
            msg = (
                f"{self.path / name / WEIGHTS} was written into while the engine read from it. Put "
                "new files in the place of a model's, and ask for an image, to use them."
            )
            raise ModelSourceError(msg)

    def _is_overwritten(self, name: str) -> bool:
        return is_overwritten(self.stamps.get(name, {}), self.path / name)


class _Status(NamedTuple):
    inode: int
    size: int
    changed_ns: int


Stamp: TypeAlias = "Mapping[str, _Status]"
"""Of a component's files by name: what changes when they do."""


def stamp_of(folder: Path) -> Stamp:
    """Return what changes when a component's files do, without reading them; of what is there."""
    stamps = {}
    for file in _component_files(folder):
        with contextlib.suppress(OSError):
            status = file.stat()
            stamps[file.name] = _Status(status.st_ino, status.st_size, status.st_mtime_ns)
    return stamps


def is_overwritten(then: Stamp, folder: Path) -> bool:
    """Tell whether a component's weights were written into since, where they are not new ones."""
    was, now = then.get(WEIGHTS), stamp_of(folder).get(WEIGHTS)
    return was is not None and now is not None and was.inode == now.inode and was != now


def _component_files(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in (GRAPH, WEIGHTS, CONFIG))


@dataclass(frozen=True)
class Missing:
    """
    A model that is not here as OpenVINO IR yet.

    Attributes:
        needs: ``"download"`` (an export may follow, which is known then) or ``"export"``.
        family: Its row, by what its index names; None for a lone VAE, and where the model must be
            downloaded to know.
        seconds: That such an export took before; None where there is nothing to go by.
    """

    needs: Literal["download", "export"]
    family: Family | None = None
    seconds: float | None = None


def missing(model: str | Path, cache_dir: Path, emit: Emit, role: Role = "model") -> Missing | None:
    """
    Tell what `resolve` would have to do first; nothing is downloaded or exported here.

    Args:
        model: As for `resolve`.
        cache_dir: As for `resolve`.
        emit: Told ``cache.discarded``.
        role: As for `resolve`.

    Raises:
        ModelSourceError: There is no such model, or it is incomplete, damaged or not supported.
    """
    cache_dir = cache_dir.expanduser().resolve()
    with _file_errors(model, cache_dir):
        found = _present(model, None, role)
        if found is None:
            return Missing("download")
        found = _plainly_named(found, cache_dir)
        ordered = _ordered(found, Digests(cache_dir / "digests.json", emit), role)
    if ordered is None:
        return None
    order, fingerprint = ordered
    target = cache_dir / "exports" / fingerprint
    if target.is_dir():
        with contextlib.suppress(ModelSourceError):
            _check(target, role)
            return None
    known = Costs(cache_dir / "costs.json", emit).expected(*_export_cost(order))
    family = None
    if role == "model":
        indexed = found if found.is_dir() else _beside(found, INDEX)
        family = family_of(order.pipeline).having({} if indexed is None else _index(indexed))
    return Missing("export", family, None if known is None else known.seconds)


def resolve(
    model: str | Path,
    cache_dir: Path,
    emit: Emit,
    *,
    revision: str | None = None,
    role: Role = "model",
) -> ModelFolder:
    """
    Find a model, export it to OpenVINO IR where it is not, and check that it is whole.

    Args:
        model: ``"demo"``, a folder of OpenVINO IR or of diffusers, a ``.safetensors`` file, or an
            id on the Hugging Face hub. One that was downloaded once is used as it is. As a VAE
            also a folder or file with nothing else.
        cache_dir: Holds exports and file digests; shared by processes. Made if it is not there.
        emit: Told ``download.*``, ``export.*``, ``cache.discarded`` and ``model.resolved``.
        revision: Branch, tag or commit of a hub id; None is its default branch.
        role: The setting that names it.

    Raises:
        ModelSourceError: There is no such model, it is incomplete, damaged, not supported, cannot
            be downloaded or exported, or `cache_dir` cannot be written.
    """
    began = time.perf_counter()
    cache_dir = cache_dir.expanduser().resolve()
    digests = Digests(cache_dir / "digests.json", emit)
    with _file_errors(model, cache_dir):
        found = _plainly_named(_locate(model, revision, emit, role), cache_dir)
        ordered = _ordered(found, digests, role)
        folder = found if ordered is None else _exported(*ordered, cache_dir, emit, role)
        resolved = _identified(folder, digests, role)
    emit(
        "model.resolved",
        model=told_path(model),
        fingerprint=resolved.fingerprint,
        pipeline=resolved.class_name,
        seconds=round(time.perf_counter() - began, 6),
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


def _plainly_named(path: Path, cache_dir: Path) -> Path:
    """Return a path that OpenVINO and JSON can take: where it is not UTF-8, of a link to it."""
    name = os.fsencode(path)
    with contextlib.suppress(UnicodeDecodeError):
        name.decode()
        return path
    link = cache_dir / "links" / (hashlib.sha256(name).hexdigest()[:32] + path.suffix)
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(path)
    return link


def _locate(model: str | Path, revision: str | None, emit: Emit, role: Role) -> Path:
    present = _present(model, revision, role)
    if present is None:
        present = hub.download(str(model), revision, emit)
        _check_source(present, role)
    return present


def _present(model: str | Path, revision: str | None, role: Role) -> Path | None:
    """
    Return where a model lies, as it was given; None where it must be downloaded.

    Links are not followed: where they lead (in the hub's cache to a file without an ending) is
    nobody's name for it.
    """
    if model == "demo":
        from holdfast.engine import demo

        return demo.model_folder()
    try:
        path = Path(model).expanduser().absolute()
    except (RuntimeError, ValueError) as error:
        msg = f"{model!r} was given as the {role}, which is no path ({error}). Give the whole path."
        raise ModelSourceError(msg) from error
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if path.is_file():
        msg = (
            f"{path} was given as the {role}, but a single file must be .safetensors. Give such a "
            "file, a folder, or a hub id (owner/name)."
        )
        raise ModelSourceError(msg)
    if isinstance(model, str) and _HUB_ID.fullmatch(model):
        with contextlib.suppress(ModelSourceError):
            present = hub.downloaded(model, revision)
            _check_source(present, role)
            return present
        return None
    msg = (
        f"{model} was given as the {role}, but there is no such folder or file. Give a folder of "
        "OpenVINO IR or diffusers, a .safetensors file, a hub id (owner/name), or 'demo'."
    )
    raise ModelSourceError(msg)


def _check_source(folder: Path, role: Role) -> None:
    """Raise where a downloaded folder lacks a part: an interrupted download leaves such."""
    if any(folder.glob(f"*/{GRAPH}")):
        _check(folder, role)
    elif role == "vae":
        _weights(folder if _is_lone_vae(folder, role) else folder / "vae")
    else:
        for part in _parts(_index(folder)):
            _weights(folder / part)


def _is_lone_vae(folder: Path, role: Role) -> bool:
    return role == "vae" and not (folder / INDEX).is_file() and (folder / CONFIG).is_file()


def _ordered(found: Path, digests: Digests, role: Role) -> tuple[Order, str] | None:
    """Return how to export a model, and what the result is known by; None where it is IR."""
    if found.is_file():
        lone = role == "vae" and not is_whole(found)
        return _order_for_vae_file(found, digests) if lone else _order_for_file(found, digests)
    if any(found.glob(f"*/{GRAPH}")):
        return None
    if role == "vae":
        return _order_for_vae(found if _is_lone_vae(found, role) else found / "vae", digests)
    return _order_for_folder(found, digests)


def _order_for_folder(source: Path, digests: Digests) -> tuple[Order, str]:
    config = _index(source)
    _check_parts(source, config, "vae", "model")
    weights = [_weights(source / part) for part in _parts(config)]
    files = [file for found, _ in weights for file in found]
    variants = {variant for _, variant in weights if variant}
    order = Order(
        source=str(source),
        pipeline=config["_class_name"],
        half=_all_in_half(files),
        variant=variants.pop() if variants else None,
    )
    return order, digests.of([*_texts(source, config), *files], source)


def _order_for_vae(source: Path, digests: Digests) -> tuple[Order, str]:
    if not source.is_dir():
        msg = f"{source.parent} was given as vae=, but is no model: it holds no VAE. Give one."
        raise ModelSourceError(msg)
    read_vae(source / CONFIG)
    files, variant = _weights(source)
    order = Order(source=str(source), pipeline=LONE_VAE, half=_all_in_half(files), variant=variant)
    return order, digests.of([source / CONFIG, *files], source)


def _order_for_vae_file(source: Path, digests: Digests) -> tuple[Order, str]:
    dtypes = check_lone_vae(source)
    beside = _beside(source, f"vae/{CONFIG}")
    if beside is None:
        msg = (
            f"{source} was given as vae=, but such a file does not say how latents are scaled. "
            f"Give a folder with its {CONFIG} and weights, or put the configs of its model "
            f"(vae/{CONFIG}) into the folder {source.with_suffix('')}."
        )
        raise ModelSourceError(msg)
    config = beside / "vae" / CONFIG
    read_vae(config)
    order = Order(source=str(source), pipeline=LONE_VAE, half=_in_half(dtypes), config=str(beside))
    return order, digests.of([config, source], source.parent)


def _order_for_file(source: Path, digests: Digests) -> tuple[Order, str]:
    found = read_checkpoint(source)
    files, pipeline = [source], found.pipeline
    beside = _beside(source, INDEX)
    if beside is not None:
        config = _index(beside)
        pipeline = config["_class_name"]
        files += _texts(beside, config)
    order = Order(
        source=str(source),
        pipeline=pipeline,
        half=_in_half(found.dtypes),
        config=str(beside) if beside else None,
        scheduler=dict(found.scheduler),
    )
    return order, digests.of(files, source.parent)


def _beside(source: Path, name: str) -> Path | None:
    """Return the folder that holds the configurations of a single file, if there is one."""
    places = (source.with_suffix(""), source.parent)
    return next((place for place in places if (place / name).is_file()), None)


def _exported(order: Order, fingerprint: str, cache_dir: Path, emit: Emit, role: Role) -> Path:
    target = cache_dir / "exports" / fingerprint
    if target.is_dir():
        try:
            _check(target, role)
        except ModelSourceError as damage:
            discard(target)
            emit("cache.discarded", level="warning", entry=target.name, why=str(damage))

    def build(scratch: Path) -> None:
        with export_told(order.source, fingerprint, scratch, emit) as tell:
            began = time.perf_counter()
            export(order, scratch, tell)
            _check(scratch, role)
            seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
        costs = Costs(cache_dir / "costs.json", emit)
        costs.record(*_export_cost(order), seconds=seconds, bytes=size)

    build_once(target, build)
    return target


def _export_cost(order: Order) -> tuple[str, str, str, str]:
    return "export", "CPU", order.pipeline, "half" if order.half else "full"


def _identified(folder: Path, digests: Digests, role: Role) -> ModelFolder:
    names = _check(folder, role)
    index = folder / INDEX
    config = read_index(index) if index.is_file() else {"_class_name": LONE_VAE}
    stamps = {name: stamp_of(folder / name) for name in names}
    fingerprints = {
        name: digests.of(_component_files(folder / name), folder / name) for name in names
    }
    texts = digests.of(_texts(folder, config), folder) if role == "model" else ""
    whole = (texts, *sorted(fingerprints.items()))
    fingerprint = hashlib.sha256(repr(whole).encode()).hexdigest()[:32]
    return ModelFolder(folder, fingerprint, config, fingerprints, stamps)


def _check(folder: Path, role: Role) -> tuple[str, ...]:
    """Return the names of an IR folder's components, each of them whole."""
    if role == "vae":
        names: tuple[str, ...] = _VAE
    else:
        config = _index(folder)
        names = family_of(config["_class_name"]).having(config).all_components
        _check_parts(folder, config, VAE_DECODER, "OpenVINO model")
    # Exports of before March 2023 have no encoder, and make images from a prompt all the same.
    present = tuple(n for n in names if n != VAE_ENCODER or (folder / n).exists())
    for name in present:
        check_ir(folder / name / GRAPH)
        read_config(folder / name / CONFIG, Config)
    return present


def _check_parts(folder: Path, config: Mapping[str, Any], vae: str, what: str) -> None:
    """Refuse a model whose parts cannot run, by what their configurations say."""
    row = family_of(config["_class_name"])
    why = row.refusal(config)
    if not why:
        denoiser = read_config(folder / row.denoiser / CONFIG, row.denoiser_config)
        why = row.denoiser_refusal(denoiser, read_vae(folder / vae / CONFIG).latent_channels)
    if why:
        raise refuse(f"The {what} in {folder}", why)


def _parts(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the folders of a diffusers model that hold weights which Holdfast runs."""
    names = family_of(config["_class_name"]).having(config).all_components
    return tuple(dict.fromkeys(_PARTS.get(name, name) for name in names))


def _weights(folder: Path) -> tuple[list[Path], str | None]:
    """Return the files with a part's weights, and the variant (``"fp16"``) in their names."""
    read_json(folder / CONFIG)
    choice = choose((path.name for path in folder.iterdir()), pickles=True)
    if not choice.files:
        raise ModelSourceError(missing_weights(str(folder), choice.instead))
    files = [folder / name for name in choice.files]
    for file in files:
        if file.suffix == ".bin":
            check_pickle(file)
    return files, choice.variant


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


def _all_in_half(files: Iterable[Path]) -> bool:
    dtypes: set[str] = set()
    for file in files:
        if file.suffix != ".safetensors":
            return False
        dtypes |= {each.dtype for each in read_header(file).tensors.values()}
    return _in_half(dtypes)


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
    config = read_index(path)
    family_of(str(config.get("_class_name", "")))
    return config

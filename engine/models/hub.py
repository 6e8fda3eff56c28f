"""Models from the Hugging Face hub: only the files that are needed, and never a pickle."""

from __future__ import annotations

import re
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from holdfast.engine.errors import ModelSourceError
from holdfast.engine.imports import quiet
from holdfast.engine.models.weights import choose, missing_weights

if TYPE_CHECKING:
    from collections.abc import Iterable

    from holdfast.states import Emit

_TEXT = re.compile(r"(model_index\.json|[^/]+/[^/]+\.(json|txt|model))")
_GRAPH = re.compile(r"[^/]+/openvino_model\.(xml|bin)")
_UNUSED = ("safety_checker", "image_encoder", "feature_extractor")


def downloaded(model: str, revision: str | None) -> Path:
    """
    Return the folder of a model that was downloaded before, perhaps in part; asks nobody.

    Raises:
        ModelSourceError: It was never downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        msg = f"{model} was not downloaded before ({error}). Download it first."
        raise ModelSourceError(msg) from error


def download(model: str, revision: str | None, emit: Emit) -> Path:
    """
    Download what a model needs into the hub's own cache, which other programs share.

    Args:
        model: ``owner/name``.
        revision: Branch, tag or commit; None is the default branch.
        emit: Told ``download.started`` and then ``download.completed`` or ``download.failed``.

    Raises:
        ModelSourceError: There is no such model, it may not be read, or the hub is out of reach.
    """
    from huggingface_hub import HfApi, snapshot_download

    facts: dict[str, Any] = {"source": model, "revision": revision}
    emit("download.started", level="info", **facts)
    began = time.perf_counter()
    try:
        with quiet():
            files = HfApi().list_repo_files(model, revision=revision)
            folder = snapshot_download(
                model, revision=revision, allow_patterns=needed(files), tqdm_class=_silent_bar()
            )
    except ModelSourceError as error:
        seconds = time.perf_counter() - began
        emit("download.failed", level="error", error=str(error), seconds=seconds, **facts)
        msg = f"{model} was given as the model, but {error}"
        raise ModelSourceError(msg) from error
    except Exception as error:  # The hub's client passes on whatever its transport raises.
        seconds = time.perf_counter() - began
        text = f"{type(error).__name__}: {error}"
        emit("download.failed", level="error", error=text, seconds=seconds, **facts)
        raise ModelSourceError(_explain(model, revision, error)) from error
    emit("download.completed", level="info", seconds=time.perf_counter() - began, **facts)
    return Path(folder)


def needed(files: Iterable[str]) -> list[str]:
    """
    Choose from a repository's files: OpenVINO IR where there is any, else each part's safetensors.

    Raises:
        ModelSourceError: A part has weights, and none that are taken; the text says which.
    """
    usable = [name for name in files if PurePosixPath(name).parts[0] not in _UNUSED]
    texts = [name for name in usable if _TEXT.fullmatch(name)]
    graphs = [name for name in usable if _GRAPH.fullmatch(name)]
    if graphs:
        return [*texts, *graphs]
    parts: dict[str, list[str]] = {}
    for name in usable:
        part, _, file = name.rpartition("/")
        parts.setdefault(part, []).append(file)
    chosen = []
    for part, names in parts.items():
        if part and "/" not in part and f"{part}/config.json" in texts:
            choice = choose(names, pickles=False)
            if choice.instead:
                raise ModelSourceError(missing_weights(f"{part} on the hub", choice.instead))
            chosen += [f"{part}/{file}" for file in choice.files]
    return [*texts, *chosen]


def _silent_bar() -> type:
    from huggingface_hub.utils import tqdm

    class SilentBar(tqdm):  # type: ignore[misc] # the hub's client publishes no types
        def __init__(self, *args: Any, **settings: Any) -> None:
            settings.pop("name", None)
            super().__init__(*args, **{**settings, "disable": True})

    return SilentBar


def _explain(model: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = f"{model} was given as the model; there is no such local folder, and on the hub"
    if isinstance(error, GatedRepoError):
        return f"{asked} it is gated. Accept its terms there, then log in with `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return f"{asked} there is no such model, or it is private. Check the name, or log in."
    if isinstance(error, RevisionNotFoundError):
        return f"{asked} it has no revision {revision}. Check the name of the branch or tag."
    return (
        f"{asked} it could not be reached ({error}). Connect to the network, or download the model "
        "elsewhere (`hf download`) and give its folder."
    )

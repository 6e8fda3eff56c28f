"""The model that is measured: random weights in the size of Stable Diffusion 1.5, made here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from holdfast.engine.imports import heavy, quiet
from holdfast.engine.models.diskcache import build_once
from holdfast.engine.models.source import resolve
from tests.support.models import build_sd15_size, build_tiny_sd

if TYPE_CHECKING:
    from pathlib import Path


def make_model(work_dir: Path, *, tiny: bool) -> dict[str, str]:
    """
    Build the model where it is not there yet, and let every system read it.

    Args:
        work_dir: Models and caches are kept in it.
        tiny: A model of a few megabytes instead, for a trial of the benchmark itself.

    Returns:
        `Workload.model`, `Workload.source` and `Workload.cache`.
    """
    name, build = ("tiny", build_tiny_sd) if tiny else ("sd15", build_sd15_size)
    source, cache, model = work_dir / name, work_dir / "cache", work_dir / f"{name}-ir"
    build_once(source, build)
    exported = resolve(source, cache, lambda *_, **__: None).path

    def assemble(target: Path) -> None:
        for file in (path for path in exported.rglob("*") if path.is_file()):
            place = target / file.relative_to(exported)
            place.parent.mkdir(exist_ok=True)
            os.link(file, place)
        _convert_tokenizer(target / "tokenizer")

    build_once(model, assemble)
    return {"model": str(model), "source": str(source), "cache": str(cache)}


def _convert_tokenizer(folder: Path) -> None:
    """Write the tokenizer as the graph that openvino-genai needs."""
    heavy()
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    with quiet():
        graph = convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=False)
        ov.save_model(graph, folder / "openvino_tokenizer.xml")

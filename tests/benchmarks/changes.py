"""What each kind of change compiles and takes, beside bare OpenVINO and beside a reload."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tests.benchmarks.costs import Costs
from tests.benchmarks.worker import cpu_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.workload import Workload

RANK = 8
REPEATS = 3


class Changes(Costs):
    """One engine that is changed in one way after the other."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.lora = write_lora(
            Path(workload.source), Path(workload.cache).parent / "line.safetensors"
        )
        self.engine.run(self.small())

    def small(self, **fields: Any) -> Any:
        """Return a request that puts img2img's components in service at little cost."""
        from holdfast.engine.requests.hires import Hires

        return Hires(prompt="a tree", seed=1, width=64, height=64, steps=1, hires_steps=1, **fields)

    def lora_on(self) -> dict[str, float]:
        """Put a LoRA in force."""
        return self._configured({"lora": ()}, {"lora": (self._use(0.8),)})

    def lora_weight(self) -> dict[str, float]:
        """Change its weight."""
        return self._configured({"lora": (self._use(0.8),)}, {"lora": (self._use(0.5),)})

    def lora_back(self) -> dict[str, float]:
        """Toggle it on and off, and measure the off: what was held before is held still."""
        return self._configured({"lora": ()}, {"lora": (self._use(0.8),)}, {"lora": ()})

    def precision(self) -> dict[str, float]:
        """Compute in float32."""
        return self._configured({"precision": "auto"}, {"precision": "f32"})

    def device(self) -> dict[str, float]:
        """Move the VAE decoder to another device."""
        return self._configured({"device": "CPU"}, {"device": {"vae_decoder": "AUTO:CPU"}})

    def scheduler(self) -> dict[str, float]:
        """Change the default scheduler."""
        return self._configured({"scheduler": None}, {"scheduler": "euler"})

    def size(self) -> dict[str, float]:
        """Ask for another size."""
        sides = itertools.count(128, 64)

        def grow() -> None:
            self.engine.prepare(self.small().but(width=next(sides)))

        return self._measured(lambda: None, grow)

    def _use(self, weight: float) -> Any:
        from holdfast.engine.requests.lora import Lora

        return Lora(self.lora, weight)

    def _configured(self, first: dict[str, Any], *then: dict[str, Any]) -> dict[str, float]:
        """Measure the last of some changes of settings; `first` undoes what is in force."""
        *between, last = then

        def begin() -> None:
            self.engine.configure(**first)
            self.reload()
            for changes in between:
                self.engine.configure(**changes)

        return self._measured(begin, lambda: self.engine.configure(**last))

    def _measured(
        self, begin: Callable[[], object], change: Callable[[], object]
    ) -> dict[str, float]:
        """Return the medians of a change, of a bare compile of the same, and of a reload."""
        rows: list[dict[str, float]] = []
        for _ in range(REPEATS):
            begin()
            before = len(self.compiled())
            seconds, cpu = _timed(change)
            compiled = self.compiled()[before:]
            bare = [self._bare(event) for event in compiled]
            reload, reload_cpu = _timed(self.reload)
            rows.append(
                {
                    "seconds": seconds,
                    "cpu": cpu,
                    "bare": sum(wall for wall, _ in bare),
                    "bare_cpu": sum(used for _, used in bare),
                    "reload": reload,
                    "reload_cpu": reload_cpu,
                    **{f"compiled:{event['component']}": 1.0 for event in compiled},
                }
            )
        return {name: statistics.median(row[name] for row in rows) for name in rows[0]}

    def reload(self) -> None:
        """Give everything up, held variants too, and load again what served."""
        mode = self.engine.mode
        self.engine.unload()
        self.engine.load(mode)

    def _bare(self, event: dict[str, Any]) -> tuple[float, float]:
        """Time OpenVINO alone: the same compile, and the first inference."""
        import openvino as ov

        core = ov.Core()
        graph = core.read_model(
            Path(self.workload.model) / event["component"] / "openvino_model.xml"
        )
        side = {"vae_encoder": 64, "unet": 16}.get(event["component"], 8)
        static = event["shape"] != "dynamic"
        shapes = {port: _shape(port, event["shape"], side) for port in graph.inputs}
        if static:
            graph.reshape(shapes)
        inputs = {
            index: np.zeros(shapes[port], port.get_element_type().to_dtype())
            for index, port in enumerate(graph.inputs)
        }
        properties = {"INFERENCE_PRECISION_HINT": event["precision"]}

        def compile_and_try() -> None:
            core.compile_model(
                graph, event["device_asked"], properties
            ).create_infer_request().infer(inputs)

        return _timed(compile_and_try)


class StaticChanges(Changes):
    """The same with a graph for each size."""

    settings: ClassVar = {"shapes": "static"}


class ByExport:
    """The way to a LoRA that optimum-intel has: fused in PyTorch, exported, and loaded."""

    def __init__(self, workload: Workload) -> None:
        from holdfast.engine.imports import heavy

        heavy()
        self.workload = workload
        self.lora = write_lora(
            Path(workload.source), Path(workload.cache).parent / "line.safetensors"
        )

    def lora_on(self) -> dict[str, float]:
        """Put a LoRA in force, down to the first inference."""
        with tempfile.TemporaryDirectory() as folder:
            seconds, cpu = _timed(lambda: self._export(folder))
        return {"seconds": seconds, "cpu": cpu}

    def _export(self, folder: str) -> None:
        import torch
        from diffusers import StableDiffusionPipeline
        from optimum.intel.openvino import OVStableDiffusionPipeline

        fused = StableDiffusionPipeline.from_pretrained(
            self.workload.source, torch_dtype=torch.float32, safety_checker=None
        )
        fused.load_lora_weights(self.lora.parent, weight_name=self.lora.name)
        fused.fuse_lora(lora_scale=0.8)
        fused.unload_lora_weights()
        fused.save_pretrained(folder)
        del fused
        exported = OVStableDiffusionPipeline.from_pretrained(folder, export=True, compile=False)
        exported.half()
        exported.compile()
        exported("a tree", width=64, height=64, num_inference_steps=1)


def _shape(port: Any, key_shape: str, side: int) -> list[int]:
    known = list(port.get_partial_shape())
    image_rank = 4
    main = [int(each) for each in key_shape.split("x")] if key_shape != "dynamic" else None
    if main and len(known) == image_rank:
        return main
    batch = main[0] if main else 1
    fill = [batch, *([side] * 3 if len(known) == image_rank else [77, 77])]
    return [fill[axis] if each.is_dynamic else each.get_length() for axis, each in enumerate(known)]


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), cpu_seconds()
    work()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def write_lora(source: Path, target: Path) -> Path:
    """Write a LoRA with random deltas for every attention projection of the UNet."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    with (source / "unet" / "diffusion_pytorch_model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    weights = {}
    for name, entry in header.items():
        if re.search(r"attn\d\.to_(q|k|v|out\.0)\.weight$", name):
            outputs, inputs = entry["shape"]
            layer = f"unet.{name.removesuffix('.weight')}"
            down, up = (
                random.normal(0, 0.02, (RANK, inputs)),
                random.normal(0, 0.02, (outputs, RANK)),
            )
            weights[f"{layer}.lora_A.weight"] = down.astype(np.float32)
            weights[f"{layer}.lora_B.weight"] = up.astype(np.float32)
    save_file(weights, target)
    return target

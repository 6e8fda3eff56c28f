"""Settings of one engine: what must be compiled follows from them, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from holdfast.engine.requests import Lora
from holdfast.engine.schedulers import check_scheduler
from holdfast.engine.values import Value

Precision = Literal["auto", "f32", "bf16", "f16", "int8", "int8-weights"]
Shapes = Literal["auto", "dynamic", "static"]
Policy = Literal["auto", "stage_first", "evict_first"]

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1024))
}


def parse_bytes(value: object) -> object:
    """
    Turn ``"8GiB"``, ``"900 MB"`` or a number into bytes.

    Raises:
        ValueError: The text is not a number with a unit of bytes.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", value)
    if match is None or match[2].lower() not in _UNITS:
        msg = "a size such as '8GiB' or '900MB' is needed"
        raise ValueError(msg)
    return int(float(match[1]) * _UNITS[match[2].lower()])


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class EngineConfig(Value):
    """
    Everything that an engine is set to.

    Attributes:
        model: ``"demo"``, a folder (OpenVINO IR or diffusers), a hub id, or a ``.safetensors``
            file.
        device: An OpenVINO device such as ``"CPU"``, ``"GPU"``, ``"AUTO:GPU,CPU"``, or one for
            each component: ``{"unet": "GPU", "vae_decoder": "CPU"}`` (others: ``"CPU"``).
        precision: What the denoiser and the VAE compute in. ``"auto"``: the device's default.
            ``"int8"``: 8-bit weights and activations of the denoiser; ``"int8-weights"``:
            weights of its linear layers alone.
        shapes: ``"dynamic"``: one compiled denoiser for every size; ``"static"``: one for each
            size, kept under the budget; ``"auto"``: dynamic on CPU, static elsewhere.
        memory_budget: Bytes, or text such as ``"8GiB"``, that all compiled components together
            may hold. None: half of the memory of the machine.
        cache_dir: Exports and learned costs. None: the user's cache folder for ``holdfast``.
        cache_limit: Bytes that `cache_dir` may hold; the least recently used go first.
        compiled_cache: Keep compiled blobs on disk. None: where the device gains by it (not CPU).
        lora: LoRA set that is in force from the first load on.
        scheduler: Default of requests that name none. None: the model's own.
        strict: Whether a request that could only be served otherwise than asked (a prompt that
            is too long) is an error; else it is served, with a `degradation`.
        properties: OpenVINO properties for every compile, for example
            ``{"INFERENCE_NUM_THREADS": 4}``.
        vae: A folder whose VAE replaces the model's (OpenVINO IR or diffusers).
        policy: ``"stage_first"`` compiles the new components before the old ones go;
            ``"evict_first"`` frees the old ones first; ``"auto"``: the former where the budget
            holds both.
        images_per_inference: How many images go through the denoiser at once. None: 1 on CPU,
            where more are not faster; all of a batch elsewhere.
        log_file: Every event is appended to it, as JSON lines.
        flight_recorder: A small bounded file that survives a crash of the process.
        log_prompts: Whether prompts stand in the log; else only their digests.
        queue_limit: Jobs that may wait at once.
        order: ``"fair"``: by priority, then as submitted; ``"fewest_recompiles"``: jobs that need
            no recompile may overtake ones that do, a bounded number of times.
        idle_unload: Seconds without a job after which the components are given up. None: never.
    """

    model: str | Path = "demo"
    device: str | dict[str, str] = "CPU"
    precision: Precision = "auto"
    shapes: Shapes = "auto"
    memory_budget: Bytes | None = None
    cache_dir: Path | None = None
    cache_limit: Bytes = 64 * 1024**3
    compiled_cache: bool | None = None
    lora: tuple[Lora, ...] = ()
    scheduler: str | None = None
    strict: bool = True
    properties: dict[str, Any] = Field(default_factory=dict)
    vae: str | Path | None = None
    policy: Policy = "auto"
    images_per_inference: Annotated[int, Field(ge=1, le=64)] | None = None
    log_file: Path | None = None
    flight_recorder: Path | None = None
    log_prompts: bool = False
    queue_limit: Annotated[int, Field(ge=1)] = 256
    order: Literal["fair", "fewest_recompiles"] = "fair"
    idle_unload: Annotated[float, Field(gt=0)] | None = None

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str | None) -> str | None:
        return None if name is None else check_scheduler(name)

    def device_of(self, component: str) -> str:
        """Return the OpenVINO device that `component` is asked to run on."""
        if isinstance(self.device, str):
            return self.device.upper()
        return self.device.get(component, "CPU").upper()

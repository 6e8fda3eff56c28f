"""Settings of one engine: what must be compiled follows from them, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import platformdirs
from pydantic import BeforeValidator, Field, field_validator
from pydantic_core import to_json

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.requests.lora import Lora
from holdfast.engine.requests.schedulers import check_scheduler
from holdfast.engine.requests.values import Location, ModelName, Value

if TYPE_CHECKING:
    from typing import Unpack

    from holdfast.engine.requests.given import EngineFields

Precision = Literal["auto", "f32", "bf16", "f16", "int8", "int8-weights"]
Shapes = Literal["auto", "dynamic", "static"]
Policy = Literal["auto", "stage_first", "evict_first"]

_SMALLEST = 1024
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1024))
}


def parse_bytes(value: object) -> object:
    """
    Turn ``"8GiB"``, ``"900 MB"`` or a number into bytes.

    Raises:
        ValueError: The text is not a number with a unit of bytes, or the unit was forgotten.
    """
    if not isinstance(value, str):
        return _with_unit(value)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", value)
    if match is None or match[2].lower() not in _UNITS:
        msg = "a size such as '8GiB' or '900MB' is needed"
        raise ValueError(msg)
    return _with_unit(int(float(match[1]) * _UNITS[match[2].lower()]))


def _with_unit(value: object) -> object:
    """Return a size as it is, but a few bytes, which are too little."""
    if isinstance(value, int) and 0 < value < _SMALLEST:
        msg = f"that is {value} bytes, which is too little: did you mean '{value}GiB'?"
        raise ValueError(msg)
    return value


Bytes = Annotated[
    int, BeforeValidator(parse_bytes, json_schema_input_type=int | str), Field(gt=0, lt=2**63)
]


def _several(value: object) -> object:
    return (value,) if isinstance(value, (str, Path)) else value


Locations = Annotated[
    tuple[Location, ...],
    BeforeValidator(_several, json_schema_input_type=str | Path | tuple[Location, ...]),
]
"""Paths, or a single one."""

FIXED = ("cache_dir", "cache_limit", "log_file", "flight_recorder", "queue_limit", "order")
"""Settings that hold as long as an engine is open."""


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
        lora_dir: Folder in which ``<lora:name:0.8>`` of a prompt finds ``name.safetensors``.
        prompt_syntax: ``"a1111"``: brackets, ``BREAK``, ``AND``, schedules and tags in prompts
            mean what they mean there; ``"plain"``: all of it is text.
        embeddings: Files of textual inversion, and folders of them; a prompt calls one by name.
        scheduler: Default of requests that name none. None: the model's own.
        strict: Whether a request that could only be served otherwise than asked (a prompt
            that names an embedding of which there is no file) is an error; else it is served, with
            a `degradation`.
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

    model: ModelName = "demo"
    device: str | dict[str, str] = "CPU"
    precision: Precision = "auto"
    shapes: Shapes = "auto"
    memory_budget: Bytes | None = None
    cache_dir: Location | None = None
    cache_limit: Bytes = 64 * 1024**3
    compiled_cache: bool | None = None
    lora: tuple[Lora, ...] = ()
    lora_dir: Location | None = None
    prompt_syntax: Literal["a1111", "plain"] = "a1111"
    embeddings: Locations = ()
    scheduler: str | None = None
    strict: bool = True
    properties: dict[str, Any] = Field(default_factory=dict)
    vae: ModelName | None = None
    policy: Policy = "auto"
    images_per_inference: Annotated[int, Field(ge=1, le=64)] | None = None
    log_file: Location | None = None
    flight_recorder: Location | None = None
    log_prompts: bool = False
    queue_limit: Annotated[int, Field(ge=1, lt=2**31)] = 256
    order: Literal["fair", "fewest_recompiles"] = "fair"
    idle_unload: Annotated[float, Field(gt=0)] | None = None

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[EngineFields]) -> None: ...

    def but(self, **changes: Unpack[EngineFields]) -> Self:
        """Return a copy with some settings changed, checked like a new one."""
        return self._but(changes)

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str | None) -> str | None:
        return None if name is None else check_scheduler(name)

    @field_validator("properties")
    @classmethod
    def _written_as_json(cls, properties: dict[str, Any]) -> dict[str, Any]:
        try:
            to_json(properties)
        except Exception as error:
            msg = "properties are names with texts, numbers and true or false"
            raise ValueError(msg) from error
        return properties

    def device_of(self, component: str) -> str:
        """Return the OpenVINO device that `component` is asked to run on."""
        if isinstance(self.device, str):
            return self.device.upper()
        return self.device.get(component, "CPU").upper()


def users_cache() -> Path:
    """
    Return where exports go that no `cache_dir` is set for.

    Raises:
        InvalidRequest: The user has no home, as in a container that runs under any number.
    """
    try:
        return Path(platformdirs.user_cache_dir("holdfast"))
    except RuntimeError as error:
        msg = (
            f"Exported models were to go to the user's cache folder, but none is known ({error}). "
            "Give a cache_dir, or set HOME or XDG_CACHE_HOME."
        )
        raise InvalidRequest(msg) from error

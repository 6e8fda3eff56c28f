"""Random walks through the real pipeline, on graphs so small that each compiles in milliseconds."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import hypothesis.strategies as st
import numpy as np
import openvino as ov
import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from openvino import opset13
from safetensors.numpy import save_file

from holdfast.engine.compiling.plan import plan_again
from holdfast.engine.errors import CompileError, InvalidRequest
from holdfast.engine.logbook.events import Emitter
from holdfast.engine.logbook.writing import JsonLines
from holdfast.engine.models.diskcache import DiskCache
from holdfast.engine.models.families import Geometry
from holdfast.engine.pipeline import CompiledPipeline
from holdfast.engine.requests.config import EngineConfig
from holdfast.engine.requests.lora import Lora
from holdfast.states import Lifecycle, Mode
from tests.support.audited import assert_clean, events_of
from tests.support.engines import CAPABILITIES, live_components

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from holdfast.engine.compiling.compiler import Component
    from holdfast.engine.compiling.keys import ComponentKey
    from holdfast.engine.compiling.plan import Plan

WEIGHTS = st.sampled_from([(), (0.5,), (1.0,), (0.5, -1.0)])
COMPILED = ("lora", "shapes", "precision")
"""The settings of the walk that keys depend on."""
GEOMETRIES = st.builds(
    Geometry, st.sampled_from([64, 96]), st.just(64), st.sampled_from([1, 2]), st.booleans()
)


# A model of toys ----------------------------------------------------------------------------------


def convolution(name: str, inputs: int, outputs: int) -> ov.Model:
    """Return a 1x1 convolution of an image of any size, whose weight is named as an export does."""
    image = opset13.parameter([-1, inputs, -1, -1], np.float32, name)
    image.output(0).set_names({name})
    weight = opset13.constant(np.full((outputs, inputs, 1, 1), 0.1, np.float32))
    weight.set_friendly_name("self.conv_in.weight")
    flat: Any = [0, 0]
    return ov.Model([opset13.convolution(image, weight, [1, 1], flat, flat, [1, 1])], [image], name)


def denoiser() -> ov.Model:
    """Return a convolution that takes a timestep and a prompt as well."""
    model = convolution("sample", 4, 4)
    timestep = opset13.parameter([-1], np.int64, "timestep")
    timestep.output(0).set_names({"timestep"})
    prompt = opset13.parameter([-1, 77, 32], np.float32, "encoder_hidden_states")
    prompt.output(0).set_names({"encoder_hidden_states"})
    ends = [
        opset13.reduce_sum(opset13.convert(timestep, "f32"), np.array([0])),
        opset13.reduce_sum(prompt, np.array([0, 1, 2])),
    ]
    outputs = [model.output(0).get_node().input_value(0).get_node(), *ends]
    return ov.Model(outputs, [*model.get_parameters(), timestep, prompt], "unet")


def text_encoder() -> ov.Model:
    tokens = opset13.parameter([-1, -1], np.int64, "input_ids")
    tokens.output(0).set_names({"input_ids"})
    table = opset13.constant(np.ones((512, 32), np.float32))
    rows = opset13.gather(table, opset13.convert(tokens, "i32"), opset13.constant(0))
    return ov.Model([rows], [tokens], "text_encoder")


@pytest.fixture(scope="module")
def toy(tiny_ir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's configurations with graphs of a layer each."""
    folder = tmp_path_factory.mktemp("toy") / "toy-ir"
    shutil.copytree(tiny_ir, folder)
    for name, graph in {
        "unet": denoiser(),
        "text_encoder": text_encoder(),
        "vae_decoder": convolution("latent_sample", 4, 3),
        "vae_encoder": convolution("sample", 3, 8),
    }.items():
        ov.save_model(graph, folder / name / "openvino_model.xml", compress_to_fp16=False)
    for name in ("vae_decoder", "vae_encoder"):
        file = folder / name / "config.json"
        whole = json.loads(file.read_text()) | {"block_out_channels": [8]}
        file.write_text(json.dumps(whole))  # latents of the image's size: nothing to cut into tiles
    return folder


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the toy's denoiser."""
    path = tmp_path_factory.mktemp("toy") / "style.safetensors"
    save_file(
        {
            "lora_unet_conv_in.lora_down.weight": np.ones((2, 4, 1, 1), np.float32),
            "lora_unet_conv_in.lora_up.weight": np.full((4, 2, 1, 1), 0.1, np.float32),
            "lora_unet_conv_in.alpha": np.array(2.0, np.float32),
        },
        path,
    )
    return path


# The walk -----------------------------------------------------------------------------------------


class Unlucky:
    """OpenVINO's core, in which the next compiles fail one after another as told."""

    def __init__(self, core: ov.Core) -> None:
        self._core = core
        self.fates: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def compile_model(self, *arguments: Any) -> ov.CompiledModel:
        if self.fates and self.fates.pop(0):
            raise RuntimeError("no luck")
        return self._core.compile_model(*arguments)


class Walk(RuleBasedStateMachine):
    """Requests, changes, failures and unloads in any order, each looked at when it is over."""

    toy: Path
    style: Path
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.components = live_components()
        self.log = self.folder / "log.jsonl"
        self.log.unlink(missing_ok=True)
        self.sink = JsonLines(self.log)
        self.emit = Emitter("walk", (self.sink,))
        self.lifecycle = Lifecycle(self.emit)
        config = EngineConfig(model=str(self.toy), precision="f32", memory_budget="100MiB")
        cache = DiskCache(self.folder, 2**30, self.emit)
        self.emit(
            "engine.opened",
            versions={}, model="toy", device_asked="CPU", settings={}, config_digest="",
            machine={}, platform="",
        )  # fmt: skip
        self.pipeline = CompiledPipeline(config, self.lifecycle, cache, self.emit)
        compiler = self.pipeline.store.compiler
        self.core = compiler.core = Unlucky(compiler.core)
        self.alive: WeakSet[Component] = WeakSet()
        self.most = 0
        self.make, compiler.make = compiler.make, self.watched

    @property
    def service(self) -> Mapping[str, ComponentKey]:
        return {name: part.key for name, part in self.pipeline.store.service.items()}

    @rule(
        first=GEOMETRIES,
        then=st.none() | st.tuples(GEOMETRIES, st.none() | WEIGHTS),
        mode=st.sampled_from(Mode),
        fates=st.lists(st.booleans(), max_size=6),
    )
    def request(
        self,
        first: Geometry,
        then: tuple[Geometry, tuple[float, ...] | None] | None,
        mode: Mode,
        fates: list[bool],
    ) -> None:
        """Serve one pass, or two as hires does."""
        stages = [self.pipeline.stage(Mode.TXT2IMG if then else mode, first)]
        if then is not None:
            loras = None if then[1] is None else self.loras(then[1])
            stages.append(self.pipeline.stage(Mode.IMG2IMG, then[0], loras))
        made = self.pipeline.plan(stages)
        if self.attempt(lambda: self.pipeline.follow(made), made, fates):
            assert self.service == stages[-1].keys
            needed = {key for stage in stages for key in stage.keys.values()}
            sizes = map(self.pipeline.store.compiler.bytes, needed)
            config = self.pipeline.config
            if config.policy != "evict_first" and sum(sizes) <= self.pipeline.budget:
                assert self.pipeline.plan(stages).compiles == ()

    @rule(
        changes=st.fixed_dictionaries(
            {},
            optional={
                "lora": WEIGHTS,
                "shapes": st.sampled_from(["static", "dynamic"]),
                "policy": st.sampled_from(["auto", "stage_first", "evict_first"]),
                "memory_budget": st.sampled_from([500_000, 1_200_000, 1_600_000, 10_000_000]),
                "precision": st.sampled_from(
                    ["f32", "bf16"] if "BF16" in CAPABILITIES else ["f32"]
                ),
            },
        ),
        fates=st.lists(st.booleans(), max_size=6),
    )
    def configure(self, changes: dict[str, Any], fates: list[bool]) -> None:
        """Change settings."""
        if "lora" in changes:
            changes["lora"] = self.loras(changes["lora"])
        before, config = self.pipeline.config, self.pipeline.config.but(**changes)
        made = self.pipeline.plan_change(config)
        assert self.pipeline.config == before
        if all(getattr(before, name) == getattr(config, name) for name in COMPILED):
            assert made.compiles == ()
        if self.attempt(lambda: self.pipeline.configure(config), made, fates):
            assert self.pipeline.config == config
            assert self.pipeline.plan_change(config).steps == ()
        else:
            assert self.pipeline.config == before

    @precondition(lambda self: self.lifecycle.mode is not None)
    @rule(fates=st.lists(st.booleans(), max_size=6))
    def recompile(self, fates: list[bool]) -> None:
        """Compile all that serves again, asked for."""
        before = self.service
        made = plan_again(self.pipeline.standing(), self.pipeline.store.compiler.price)
        if self.attempt(self.pipeline.recompile, made, fates):
            assert self.service == before

    @rule()
    def unload(self) -> None:
        """Give everything back."""
        self.pipeline.unload("asked for")
        assert not self.pipeline.store.held
        assert not self.service

    def watched(self, key: ComponentKey) -> Component:
        """Make a component, and remember how much all of them held at most."""
        component = self.make(key)
        self.alive.add(component)
        self.most = max(self.most, sum(each.bytes for each in self.alive))
        return component

    def attempt(self, act: Callable[[], object], made: Plan, fates: list[bool]) -> bool:
        """Do something under a fate: whatever comes of it, the pipeline is whole afterwards."""
        note(f"{made}\n")
        mode, before = self.lifecycle.mode, self.service
        modes = {mode, None, *(move.mode for moves in made.stages for move in moves)}
        budget, self.most = self.pipeline.budget, 0
        self.core.fates = list(fates)
        try:
            act()
            error = None
        except (InvalidRequest, CompileError) as raised:
            error = raised
        self.core.fates = []
        assert isinstance(error, InvalidRequest) == (not made.fits)
        if isinstance(error, InvalidRequest):
            assert (self.lifecycle.mode, self.service) == (mode, before)
        elif isinstance(error, CompileError):
            assert "no luck" in str(error)
            unloaded = self.lifecycle.mode is None and mode is not None
            assert unloaded == ("the engine is unloaded" in str(error))
        assert self.lifecycle.mode in modes
        assert self.most <= max(budget, self.pipeline.budget)
        self.whole()
        return error is None

    def whole(self) -> None:
        """Make sure that the state is true and that the budget holds."""
        mode, store = self.lifecycle.mode, self.pipeline.store
        assert not self.lifecycle.state.is_recompiling
        names = () if mode is None else self.pipeline.model.family.components(mode)
        assert set(self.service) == set(names)
        assert set(self.service.values()) <= set(store.held)
        assert sum(store.held.values()) <= self.pipeline.budget

    def loras(self, weights: tuple[float, ...]) -> tuple[Lora, ...]:
        return tuple(Lora(self.style, weight) for weight in weights)

    def teardown(self) -> None:
        self.pipeline.unload("closed")
        assert live_components() == self.components
        self.emit("engine.closed", state="unloaded", uptime_seconds=0.0)
        self.sink.close()
        assert_clean(self.log)
        events = events_of(self.log)
        assert not [event for event in events if event["event"] == "plan.missed"]


@pytest.mark.parametrize("walks", [10, pytest.param(200, marks=pytest.mark.sweep)])
def test_any_sequence_keeps_what_must_hold(
    toy: Path, style: Path, tmp_path_factory: pytest.TempPathFactory, walks: int
) -> None:
    """
    Whatever is asked for in whatever order, and whatever fails meanwhile, all of this holds.

    A key is never compiled twice while it is held, what is done is what was planned, the budget is
    never exceeded, every recompile returns to its mode or says that it unloaded, a failed change
    changes no setting, and at the end nothing is left in memory.
    """
    Walk.toy, Walk.style, Walk.folder = toy, style, tmp_path_factory.mktemp("walk")
    run_state_machine_as_test(
        Walk,
        settings=settings(
            max_examples=walks,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

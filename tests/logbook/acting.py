"""
An engine's events without an engine: the real emitter and lifecycle, driven by a script.

What is acted is what `holdfast.engine.engine.Engine` tells of the same requests.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING, Any

from holdfast.engine.events import Emitter
from holdfast.states import Lifecycle, Mode, Trigger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

TXT2IMG = ("text_encoder", "unet", "vae_decoder")
PIPELINES = {
    Mode.TXT2IMG: "OVStableDiffusionPipeline",
    Mode.IMG2IMG: "OVStableDiffusionImg2ImgPipeline",
}


def digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


class Actor:
    def __init__(self, *sinks: Callable[[Mapping[str, Any]], None], name: str = "acted") -> None:
        self.emit = Emitter(name, sinks)
        self.lifecycle = Lifecycle(self.emit)
        self.held: dict[str, str] = {}
        self.service: dict[str, str] = {}
        self.lora: tuple[str, ...] = ()

    def open(self) -> None:
        self.emit(
            "engine.opened", versions={"holdfast": "0.1.0"}, model="demo", device_asked="CPU",
            config_digest=digest("config"), platform="acted",
        )  # fmt: skip

    def close(self) -> None:
        if self.lifecycle.mode:
            self.release()
            self.lifecycle.fire(Trigger.UNLOAD, reason="closed", rss_bytes=300 << 20)
        self.emit("engine.closed", state=self.lifecycle.state.value, uptime_seconds=1.0)

    def key(self, component: str) -> str:
        return digest(component, self.lora if component == "unet" else ())

    def plan(self, steps: Iterable[str]) -> None:
        steps = list(steps)
        self.emit(
            "plan.made", steps=steps, reasons=["" for _ in steps], expected_seconds=None,
            expected_bytes=0, fits=True,
        )  # fmt: skip

    def compile(self, component: str) -> None:
        key = self.key(component)
        if self.lora and component == "unet":
            with self.emit.span("component.fuse", component=component, lora=list(self.lora)) as f:
                f["layers"] = 4
        facts = {"component": component, "key": key, "device_asked": "CPU", "shape": "dynamic"}
        with self.emit.span("component.compile", **facts) as learned:
            learned.update(device="CPU", precision="bf16", cache="miss", bytes=1 << 20)
        self.held[key] = component
        self.service[component] = key

    def load(self, mode: Mode = Mode.TXT2IMG) -> None:
        for component in TXT2IMG:
            self.compile(component)
        self.lifecycle.fire(Trigger.load(mode), reason=f"mode: none -> {mode}", rss_bytes=1 << 30)

    def switch(self, mode: Mode) -> None:
        if mode is Mode.IMG2IMG and "vae_encoder" not in self.service:
            self.compile("vae_encoder")
        if mode is not self.lifecycle.mode:
            self.lifecycle.fire(Trigger.switch(mode), reason=f"mode: other -> {mode}")

    def recompile(self, *lora: str) -> None:
        old, self.lora = "+".join(self.lora) or "none", lora
        why = f"lora: {old} -> {'+'.join(lora) or 'none'}"
        self.lifecycle.fire(Trigger.RECOMPILE, reason=why)
        self.compile("unet")
        self.lifecycle.fire(Trigger.RECOMPILED, reason=why, rss_bytes=1100 << 20)

    def release(self) -> None:
        for key, component in self.held.items():
            self.emit("component.evicted", component=component, key=key, bytes=1 << 20, why="end")
        self.held, self.service = {}, {}

    def snapshot(self) -> None:
        self.emit(
            "engine.snapshot", state=self.lifecycle.state.value, mode=self.lifecycle.mode,
            held=sorted(self.held), lora=list(self.lora),
        )  # fmt: skip

    @contextlib.contextmanager
    def request(self, request_id: str, *, side: int, steps: int = 4) -> Iterator[None]:
        facts = {"kind": "hires", "width": side, "height": side, "steps": steps, "seeds": [7]}
        with (
            self.emit.scope(request_id=request_id),
            self.emit.span("request", **facts) as learned,
        ):
            yield
            learned.update(width=2 * side, height=2 * side)

    def denoise(self, number: int, taken: str, *, side: int, steps: int = 4) -> str:
        mode = self.lifecycle.mode
        assert mode
        made = digest(number, taken, side, self.lora)
        self.emit("view.created", mode=mode, pipeline=PIPELINES[mode], compiles=0)
        facts: dict[str, Any] = {
            "mode": mode, "pipeline": PIPELINES[mode], "width": side,
            "height": side, "steps": steps, "strength": 0.5 if number == 2 else None,
            "scheduler": "EulerDiscreteScheduler", "guidance": 7.0, "lora": list(self.lora),
            "input": "image" if taken else "none", "input_digest": taken or None, "images": 1,
        }  # fmt: skip
        with (
            self.emit.scope(**{"pass": number, "mode": mode}),
            self.emit.span("pass", **facts) as learned,
        ):
            for step in range(1, steps + 1):
                self.emit("step.completed", step=step, steps=steps, image=0, seconds=0.01)
            learned.update(evaluations=steps, output_digest=made)
        return made

    def decode(self, latents: str) -> str:
        image = digest("image", latents)
        self.emit(
            "decode.completed", images=1, seconds=0.003, tiled=False, input_digest=latents,
            output_digest=image,
        )  # fmt: skip
        return image

    def hires(self, request_id: str, *lora: str, side: int = 64) -> None:
        """Two passes; the second one with its own LoRA set where one is given."""
        relora = bool(lora) and lora != self.lora
        back = ["switch txt2img"] if self.lifecycle.mode is Mode.IMG2IMG else []
        unet = digest("unet", lora)
        encoder = ["compile vae_encoder " + digest("vae_encoder", ())]
        encoder = [] if "vae_encoder" in self.service else encoder
        again = ["recompile img2img", f"fuse unet {unet}", f"compile unet {unet}"]
        with self.request(request_id, side=side):
            self.plan([*back, *encoder, "switch img2img", *(again if relora else [])])
            self.switch(Mode.TXT2IMG)
            first = self.denoise(1, "", side=side)
            image = self.decode(first)
            large = digest("lanczos", image)
            self.emit(
                "upscale.completed", upscaler="lanczos", space="image", width=2 * side,
                height=2 * side, input_digest=image, output_digest=large, seconds=0.002,
            )  # fmt: skip
            self.switch(Mode.IMG2IMG)
            if relora:
                self.recompile(*lora)
            self.decode(self.denoise(2, large, side=2 * side))


def hires_with_lora(actor: Actor) -> None:
    """A load, a hires request, and one whose second pass has a LoRA of its own."""
    actor.open()
    actor.plan([f"compile {name} {actor.key(name)}" for name in TXT2IMG] + ["load txt2img"])
    actor.load()
    actor.hires("first")
    actor.emit("memory.sampled", rss_bytes=1200 << 20, held_bytes=4 << 20)
    actor.hires("second", "ink@0.8")
    actor.snapshot()
    actor.close()


def failed_recompile(actor: Actor) -> None:
    """A recompile in which the UNet fails: the old components stay in service."""
    actor.open()
    actor.load()
    actor.plan(["recompile txt2img", f"compile unet {digest('unet', ('big@1',))}"])
    actor.lifecycle.fire(Trigger.RECOMPILE, reason="lora: none -> big@1")
    facts = {
        "component": "unet", "key": digest("unet", ("big@1",)), "device_asked": "CPU",
        "shape": "dynamic",
    }  # fmt: skip
    with contextlib.suppress(MemoryError), actor.emit.span("component.compile", **facts):
        raise MemoryError("out of memory: asked for 12 GiB")
    actor.lifecycle.fire(Trigger.RECOMPILE_ROLLED_BACK, reason="unet: MemoryError")
    actor.hires("after")
    actor.snapshot()
    actor.close()


def ten_at_once(actor: Actor) -> None:
    """Ten requests in the queue, served one after the other."""
    actor.open()
    actor.load()
    for number in range(10):
        actor.emit("request.queued", request_id=f"r{number}", kind="hires", ahead=number)
    for number in range(10):
        actor.hires(f"r{number}")
    actor.snapshot()
    actor.close()

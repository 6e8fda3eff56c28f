"""
Holdfast and the other ways to a hires image, each as its own documentation shows it.

Each class loads in its constructor and makes one image in `hires`. What one of them needs is
imported by it alone, so that its process holds and starts nothing else.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from tests.benchmarks.workload import Workload


class System(Protocol):
    """A way to make hires images."""

    def __init__(self, workload: Workload) -> None:
        """Load what takes loading."""

    def hires(self, prompt: str, seed: int, save: str) -> None:
        """Make one image; write it where `save` says."""


class Holdfast:
    """One engine."""

    settings: ClassVar[dict[str, Any]] = {}
    log: Path | None = None

    def __init__(self, workload: Workload) -> None:
        from holdfast.engine.engine import Engine

        self.workload = workload
        self.engine = Engine(
            workload.model, cache_dir=Path(workload.cache), log_file=self.log, **self.settings
        )

    def hires(self, prompt: str, seed: int, save: str) -> None:
        self.engine.run(self.request(prompt, seed)).images[0].save(save)

    def request(self, prompt: str, seed: int) -> Any:
        """Return the workload as a request."""
        from holdfast.engine.requests.hires import Hires

        load = self.workload
        return Hires(
            prompt=prompt,
            seed=seed,
            width=load.side,
            height=load.side,
            hires_width=load.hires_side,
            hires_height=load.hires_side,
            steps=load.steps,
            hires_steps=load.hires_steps,
            strength=load.strength,
            guidance=load.guidance,
            upscaler="lanczos",
        )


class HoldfastInt8(Holdfast):
    """One engine with the denoiser in 8 bits."""

    settings: ClassVar = {"precision": "int8"}


class HoldfastInt8Static(Holdfast):
    """The same, with a denoiser for each size."""

    settings: ClassVar = {"precision": "int8", "shapes": "static"}


class HoldfastInt8Weights(Holdfast):
    """One engine with the denoiser's weights in 8 bits."""

    settings: ClassVar = {"precision": "int8-weights"}


class GenAI:
    """openvino-genai: a text-to-image pipeline on an image-to-image pipeline's models."""

    def __init__(self, workload: Workload) -> None:
        import openvino_genai

        self.workload = workload
        self.img2img = openvino_genai.Image2ImagePipeline(workload.model, "CPU")
        self.txt2img = openvino_genai.Text2ImagePipeline(self.img2img)

    def hires(self, prompt: str, seed: int, save: str) -> None:
        self._hires(prompt, save, rng_seed=seed)

    def alike(self, prompt: str, seed: int, save: str) -> None:
        """Make the image from the noise that the others start from."""
        import openvino_genai

        self._hires(prompt, save, generator=lambda: openvino_genai.TorchGenerator(seed))

    def _hires(self, prompt: str, save: str, **noise: Any) -> None:
        import numpy as np
        import openvino as ov
        from PIL import Image

        def fresh() -> dict[str, Any]:
            return {name: each() if callable(each) else each for name, each in noise.items()}

        load = self.workload
        composed = self.txt2img.generate(
            prompt,
            width=load.side,
            height=load.side,
            num_inference_steps=load.steps,
            guidance_scale=load.guidance,
            **fresh(),
        )
        larger = Image.fromarray(composed.data[0]).resize((load.hires_side,) * 2, Image.LANCZOS)
        images = self.img2img.generate(
            prompt,
            ov.Tensor(np.asarray(larger)[None]),
            strength=load.strength,
            num_inference_steps=load.schedule,
            guidance_scale=load.guidance,
            **fresh(),
        )
        Image.fromarray(images.data[0]).save(save)


class _Pipelines:
    """Two pipelines with the interface of diffusers."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def compose(self, pipeline: Any, prompt: str, seed: int) -> Image.Image:
        """Run the first pass."""
        import torch

        load = self.workload
        image: Image.Image = pipeline(
            prompt,
            width=load.side,
            height=load.side,
            num_inference_steps=load.steps,
            guidance_scale=load.guidance,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        return image

    def refine(self, pipeline: Any, image: Image.Image, prompt: str, seed: int) -> Image.Image:
        """Enlarge, and run the second pass."""
        import torch

        load = self.workload
        refined: Image.Image = pipeline(
            prompt,
            image=image.resize((load.hires_side,) * 2, 1),  # Lanczos
            strength=load.strength,
            num_inference_steps=load.schedule,
            guidance_scale=load.guidance,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        return refined


class Optimum(_Pipelines):
    """optimum-intel: two pipelines, each with models of its own."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.txt2img, self.img2img = self.load("txt2img"), self.load("img2img")

    def load(self, mode: str) -> Any:
        """Load one pipeline."""
        from holdfast.engine.imports import heavy

        heavy()
        import optimum.intel.openvino as optimum_openvino

        name = {
            "txt2img": "OVStableDiffusionPipeline",
            "img2img": "OVStableDiffusionImg2ImgPipeline",
        }
        pipeline = getattr(optimum_openvino, name[mode]).from_pretrained(self.workload.model)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def hires(self, prompt: str, seed: int, save: str) -> None:
        composed = self.compose(self.txt2img, prompt, seed)
        self.refine(self.img2img, composed, prompt, seed).save(save)


class Reload(Optimum):
    """optimum-intel: one pipeline at a time, loaded for each pass and dropped after it."""

    def __init__(self, workload: Workload) -> None:
        _Pipelines.__init__(self, workload)

    def hires(self, prompt: str, seed: int, save: str) -> None:
        composed = self.compose(self.load("txt2img"), prompt, seed)
        gc.collect()
        self.refine(self.load("img2img"), composed, prompt, seed).save(save)
        gc.collect()


class Diffusers(_Pipelines):
    """diffusers in PyTorch, float32, both pipelines on one set of weights."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        from holdfast.engine.imports import heavy

        heavy()
        import torch
        from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

        self.txt2img = StableDiffusionPipeline.from_pretrained(
            workload.source, torch_dtype=torch.float32, safety_checker=None
        )
        self.img2img = StableDiffusionImg2ImgPipeline(**self.txt2img.components)
        for pipeline in (self.txt2img, self.img2img):
            pipeline.set_progress_bar_config(disable=True)

    def hires(self, prompt: str, seed: int, save: str) -> None:
        composed = self.compose(self.txt2img, prompt, seed)
        self.refine(self.img2img, composed, prompt, seed).save(save)


class Floor:
    """The bare inferences that the job needs, on the same components; no image comes of them."""

    def __init__(self, workload: Workload) -> None:
        import openvino as ov

        core = ov.Core()
        self.workload = workload
        unet = json.loads((Path(workload.model) / "unet" / "config.json").read_text())
        self.text_width = unet["cross_attention_dim"]
        self.requests = {
            name: core.compile_model(
                Path(workload.model) / name / "openvino_model.xml", "CPU"
            ).create_infer_request()
            for name in ("text_encoder", "unet", "vae_decoder", "vae_encoder")
        }

    def hires(self, prompt: str, seed: int, save: str) -> None:
        del prompt, save
        import numpy as np

        load = self.workload
        random = np.random.default_rng(seed)
        for _ in range(2):
            self.infer("text_encoder", random.integers(0, 99, (1, 77)))
        for side, steps in ((load.side, load.steps), (load.hires_side, load.hires_steps)):
            latent = side // 8
            if side == load.hires_side:
                self.infer("vae_encoder", random.random((1, 3, side, side), np.float32))
            text = random.random((2, 77, self.text_width), np.float32)
            sample = random.random((2, 4, latent, latent), np.float32)
            for step in range(steps):
                self.infer("unet", sample, np.array(step), text)
            self.infer("vae_decoder", sample[:1])

    def infer(self, name: str, *inputs: np.ndarray) -> None:
        """Run one component."""
        self.requests[name].infer(dict(enumerate(inputs)), share_inputs=True)

"""
The demo model's recipe: ``python -m holdfast.engine.demo.train``.

Draws its own scenes, trains the VAE, the text encoder, the UNet on both, then the style LoRA,
measures them, and writes all of it in diffusers' layout. Each stage goes on from its last
checkpoint. Needs ``holdfast[train]``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.engine.demo import card, parts, scenes, stock
from holdfast.engine.imports import heavy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

_LATENT_SPREAD = 1.5
_LATENT_NOISE = 0.1  # deviation, in scaled latents, of what a UNet leaves in them
_OTHER_WORDS = (
    "a an the and of on in at to with near against , . background outlined photo please draw"
)
_STYLED = ("to_q", "to_k", "to_v", "to_out.0", "time_emb_proj", "conv1", "conv2")


@dataclass(frozen=True)
class Recipe:
    """How long and on how much each stage trains; `seed` fixes every choice in it."""

    seed: int = 0
    vae_steps: int = 3_300
    vae_batch: int = 12
    vae_pictures: int = 8_000
    decoder_steps: int = 3_000
    decoder_outlined: float = 0.4
    text_steps: int = 2_000
    text_batch: int = 64
    small_scenes: int = 24_000
    steps: int = 12_000
    small_batch: int = 32
    large_batch: int = 8
    large_every: int = 8
    finish_steps: int = 8_000
    finish_large_every: int = 2
    outlined: float = 0.04
    style_scenes: int = 4_000
    style_steps: int = 4_500
    style_large_every: int = 4
    style_rank: int = 6


class Stage:
    """
    The steps of one stage: learning rate, gradients on two threads, checkpoints, losses told.

    Two threads that meet once a step share busy cores far better than the threads of one operator,
    which meet after every one. Two addends commute, so their sum stays reproducible.
    """

    def __init__(self, name: str, file: Path, steps: int, rate: float, model: Any) -> None:
        import torch

        self._name, self._file, self._steps, self._rate = name, file, steps, rate
        learned = [each for each in model.parameters() if each.requires_grad]
        self._optimiser = torch.optim.AdamW(
            learned, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(1 - 12 / steps)  # type: ignore[no-untyped-call]  # torch leaves it so
        self.average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
        self._model, self._learned, self._pool = model, learned, parts.two_threads()

    def train(
        self, batch: Callable[[int], tuple[torch.Tensor, ...]], loss: Callable[..., torch.Tensor]
    ) -> Any:
        """
        Run the steps that are left.

        Args:
            batch: Makes the tensors of a step from its number.
            loss: Makes their loss from them.

        Returns:
            The model, its weights averaged over the last steps (EMA).
        """
        import torch

        losses: list[float] = []
        for step in self._left():
            self._optimiser.param_groups[0]["lr"] = self._rate * self._slope(step)
            self._optimiser.zero_grad()
            losses.append(self._backward(batch(step), loss))
            torch.nn.utils.clip_grad_norm_(self._learned, 1.0)
            self._optimiser.step()
            self.average.update_parameters(self._model)
            if len(losses) == 50:  # noqa: PLR2004 told every so often
                _tell(f"{self._name} {step + 1}: loss {np.mean(losses):.4f}")
                losses.clear()
        return self.average.module.eval()

    def _slope(self, step: int) -> float:
        """Warm up over 100 steps, hold, and fall to nothing over the last third."""
        return min(1.0, (step + 1) / 100, 3 * (self._steps - step) / self._steps)

    def _backward(
        self, batch: tuple[torch.Tensor, ...], loss: Callable[..., torch.Tensor]
    ) -> float:
        def half(which: int) -> float:
            import torch

            with torch.autocast("cpu", torch.bfloat16):
                value = loss(*(part.chunk(2)[which] for part in batch)) / 2
            value.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
            return float(value.detach())

        return sum(self._pool.map(half, (0, 1)))

    def _left(self) -> Iterator[int]:
        """Count the steps from the last checkpoint on, and write one after every 250."""
        import torch

        kept = {"model": self._model, "average": self.average, "optimiser": self._optimiser}
        first = 0
        if self._file.exists():
            found = torch.load(self._file)
            first = found["step"]
            for name, part in kept.items():
                part.load_state_dict(found[name])
        for step in range(first, self._steps):
            yield step
            if (step + 1) % 250 == 0 or step + 1 == self._steps:
                states = {name: part.state_dict() for name, part in kept.items()}
                torch.save({"step": step + 1, **states}, self._file.with_suffix(".new"))
                self._file.with_suffix(".new").replace(self._file)


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)  # noqa: T201 a command's output


def _pixel_batches(
    pixels: torch.Tensor, recipe: Recipe
) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """Choose pictures for each step, and noise in the shape of their latents."""
    import torch

    def batch(step: int) -> tuple[torch.Tensor, ...]:
        rng = np.random.default_rng((recipe.seed, step))
        chosen = pixels[rng.integers(len(pixels), size=recipe.vae_batch)]
        shape = (len(chosen), 4, parts.LATENT_SIDE, parts.LATENT_SIDE)
        return chosen, torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    return batch


def train_vae(recipe: Recipe, work: Path) -> Any:
    """Train the VAE on L1 and a little KL; its latents then have a deviation of 1.5."""
    import torch
    from diffusers import AutoencoderKL

    done = work / "vae"
    if done.exists():
        return AutoencoderKL.from_pretrained(done).eval()
    torch.manual_seed(recipe.seed)
    drawn = stock.pictures(recipe.vae_pictures, recipe.seed, outlined=recipe.outlined)
    pixels = stock.to_pixels(list(drawn))
    vae = parts.autoencoder()

    def loss(pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        posterior = vae.encode(pixels).latent_dist
        restored = vae.decode(posterior.mean + posterior.std * noise).sample
        kl: torch.Tensor = posterior.kl().float().mean() / pixels[0].numel()
        error: torch.Tensor = (restored.float() - pixels).abs().mean()
        return error + 3e-3 * kl

    stage = Stage("vae", work / "vae.pt", recipe.vae_steps, 2e-3, vae)
    vae = stage.train(_pixel_batches(pixels, recipe), loss)
    with torch.no_grad():
        spread = vae.encode(pixels[:512]).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=_LATENT_SPREAD / float(spread))
    vae.save_pretrained(done)
    return vae


def refine_decoder(recipe: Recipe, work: Path, vae: Any) -> Any:
    """
    Train the decoder alone for longer, on latents with a little noise, as a UNet's have.

    Errors between neighbours count beside those of the pixels, so that corners and edges come out.
    Many of its pictures are outlines: from few of them it learns to fill small ones in.
    The encoder, and with it what the UNet learns, stays as it is.
    """
    import torch

    torch.manual_seed(recipe.seed + 1)
    drawn = stock.pictures(recipe.vae_pictures, recipe.seed + 4, outlined=recipe.decoder_outlined)
    pixels = stock.to_pixels(list(drawn))
    vae.requires_grad_(requires_grad=False)
    vae.decoder.requires_grad_(requires_grad=True)
    vae.post_quant_conv.requires_grad_(requires_grad=True)
    noisy = _LATENT_NOISE / vae.config.scaling_factor

    def loss(pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean = vae.encode(pixels).latent_dist.mean
        error = vae.decode(mean + noisy * noise).sample.float() - pixels
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        total: torch.Tensor = error.abs().mean() + edges
        return total

    stage = Stage("decoder", work / "decoder.pt", recipe.decoder_steps, 1e-3, vae)
    refined = stage.train(_pixel_batches(pixels, recipe), loss)
    return refined.requires_grad_(requires_grad=False)


def train_text_encoder(recipe: Recipe, work: Path, tokens: Any) -> Any:
    """
    Teach the text encoder what prompts mean: from the mean of its states every fact can be read.

    Learning that from pictures alone takes the UNet far longer than learning to draw.
    """
    import torch
    from torch.nn.functional import cross_entropy

    torch.manual_seed(recipe.seed)
    text, answers = parts.text_encoder(tokens), stock.meanings()
    readers = torch.nn.Linear(text.config.hidden_size, sum(answers))

    def batch(step: int) -> tuple[torch.Tensor, ...]:
        rng = np.random.default_rng((recipe.seed, step))
        return stock.sentences(tokens, recipe.text_batch, rng, outlined=recipe.outlined)

    def loss(spelled: torch.Tensor, meant: torch.Tensor) -> torch.Tensor:
        said = readers(text(spelled).last_hidden_state.mean(1)).float().split(answers, dim=1)
        facts = zip(said, meant.unbind(1), strict=True)
        return torch.stack([cross_entropy(each, fact) for each, fact in facts]).mean()

    both = torch.nn.ModuleList([text, readers])
    learned, _ = Stage("text", work / "text.pt", recipe.text_steps, 1e-3, both).train(batch, loss)
    return learned.requires_grad_(requires_grad=False)


def _velocity_loss(text: Any, unet: Any) -> Callable[..., torch.Tensor]:
    """Build the v-prediction loss (Salimans & Ho 2022): v = sqrt(a) noise - sqrt(1 - a) x."""
    from torch.nn.functional import mse_loss

    levels = parts.scheduler().alphas_cumprod

    def loss(
        tokens: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        level = levels[times][:, None, None, None]
        signal, spread = level.sqrt(), (1 - level).sqrt()
        states = text(tokens).last_hidden_state
        said = unet(signal * latents + spread * noise, times, states).sample
        return mse_loss(said.float(), signal * noise - spread * latents)

    return loss


def _both_sizes(
    recipe: Recipe,
    vae: Any,
    work: Path,
    *,
    name: str,
    small: int,
    outlined: float = 0.0,
    striped: bool = False,
) -> list[stock.Stock]:
    """Encode scenes for both passes; of the larger ones an eighth as many."""
    stocks = []
    for number, (size, count) in enumerate(((stock.SMALL, small), (stock.LARGE, small // 8)), 1):
        file, seed = work / f"{name}-{size}.pt", recipe.seed + number
        stocks.append(
            stock.encode(vae, size, count, seed=seed, outlined=outlined, striped=striped, file=file)
        )
    return stocks


def _batches(
    recipe: Recipe, tokens: Any, stocks: list[stock.Stock], large_every: int
) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """Make batches of small scenes, and every so often one of large ones."""
    small, large = stocks

    def batch(step: int) -> tuple[torch.Tensor, ...]:
        rng = np.random.default_rng((recipe.seed, step))
        if step % large_every == large_every - 1:
            return large.batch(tokens, recipe.large_batch, rng)
        return small.batch(tokens, recipe.small_batch, rng)

    return batch


def train_unet(recipe: Recipe, work: Path, vae: Any, tokens: Any, text: Any) -> Any:
    """Train the UNet on small latents with a few large ones, and then on as many of both."""
    import torch
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(recipe.seed)
    stocks = _both_sizes(
        recipe, vae, work, name="scenes", small=recipe.small_scenes, outlined=recipe.outlined
    )
    _tell(" and ".join(f"{len(each.latents)} scenes" for each in stocks) + " encoded")
    unet = parts.unet()
    unet.set_attn_processor(AttnProcessor())  # its backward is the faster one on a CPU

    stage = Stage("unet", work / "unet.pt", recipe.steps, 1e-3, unet)
    batch = _batches(recipe, tokens, stocks, recipe.large_every)
    unet = stage.train(batch, _velocity_loss(text, unet))
    stage = Stage("finish", work / "finish.pt", recipe.finish_steps, 5e-4, unet)
    batch = _batches(recipe, tokens, stocks, recipe.finish_large_every)
    return stage.train(batch, _velocity_loss(text, unet))


def train_style(recipe: Recipe, work: Path, vae: Any, pipe: Any) -> dict[str, torch.Tensor]:
    """
    Train a LoRA of the style, striped backgrounds, on a copy of the pipeline's UNet.

    Returns:
        The LoRA in float16, by PEFT's names without `unet.` before them.
    """
    import torch
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(recipe.seed)
    stocks = _both_sizes(recipe, vae, work, name="stripes", small=recipe.style_scenes, striped=True)
    unet = type(pipe.unet).from_config(pipe.unet.config)
    unet.load_state_dict(pipe.unet.state_dict())
    unet.requires_grad_(requires_grad=False)
    rank = recipe.style_rank
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=_STYLED))
    stage = Stage("style", work / "stripes.pt", recipe.style_steps, 2e-3, unet)
    batch = _batches(recipe, pipe.tokenizer, stocks, recipe.style_large_every)
    styled = stage.train(batch, _velocity_loss(pipe.text_encoder, unet))
    learned = get_peft_model_state_dict(styled)
    return {name: weight.half().contiguous() for name, weight in learned.items()}


def new_tokenizer() -> Any:
    """Build the tokenizer for every word that a prompt of the grammar can hold."""
    said = [way for ways in scenes.WORDS.values() for way in ways]
    return parts.tokenizer(parts.words_in([*said, *scenes.OPENINGS, _OTHER_WORDS]))


def main() -> None:
    """Run what is left of every stage, then write model, LoRA in both formats, and card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="what is made")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="of the UNet")
    arguments = parser.parse_args()
    heavy()
    out, recipe = arguments.out, Recipe(seed=arguments.seed, steps=arguments.steps)
    work = out / "checkpoints"
    work.mkdir(parents=True, exist_ok=True)
    vae = refine_decoder(recipe, work, train_vae(recipe, work))
    tokens = new_tokenizer()
    text = train_text_encoder(recipe, work, tokens)
    unet = train_unet(recipe, work, vae, tokens, text)
    pipe = parts.pipeline(tokens, text, unet, vae)
    lora = train_style(recipe, work, vae, pipe)
    parts.save_lora(lora, out)
    steps = recipe.steps + recipe.finish_steps
    card.write(pipe, out, steps=steps, seed=recipe.seed)
    parts.save(pipe, out / "model")


if __name__ == "__main__":
    main()

"""
Img2img of a flow: the whole schedule of a txt2img pipeline, begun late and from an image.

Equal, bit for bit, to the img2img pipelines of diffusers where there are such; it needs none.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def begin_late(
    scheduler: Any, steps: int, clean: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """
    Have a scheduler leave out the beginning of whatever schedule its pipeline sets.

    Only the pipeline knows that schedule, which may depend on the image's size. So the latents to
    hand to it are filled when it has set its schedule, with as much noise as belongs there.

    Args:
        scheduler: Of a flow. Changed; good for one pass.
        steps: That are run, the last ones.
        clean: The image's latents, as the pipeline takes them.
        noise: The same shape.

    Returns:
        The latents for the pipeline.
    """
    import torch

    begun = torch.empty_like(clean)
    set_whole = scheduler.set_timesteps

    @functools.wraps(set_whole)  # pipelines look at what it takes
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        set_whole(*args, **kwargs)
        first = len(scheduler.timesteps) - steps
        scheduler.timesteps = scheduler.timesteps[first:]
        scheduler.sigmas = scheduler.sigmas[first:]
        scheduler.num_inference_steps = steps
        share = float(scheduler.sigmas[0])
        begun.copy_(share * noise + (1.0 - share) * clean)

    scheduler.set_timesteps = set_timesteps
    return begun

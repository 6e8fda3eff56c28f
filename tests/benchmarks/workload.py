"""What every system is asked for, and what each answers."""

from __future__ import annotations

import msgspec


class Workload(msgspec.Struct, frozen=True):
    """
    One hires job, the same for all systems: Euler and Lanczos aside, nothing is left to defaults.

    Attributes:
        model: Folder of OpenVINO IR, with a tokenizer for openvino-genai.
        source: The same weights as a diffusers folder.
        cache: Holdfast's cache folder.
        side: Pixels of the first pass, square.
        hires_side: Pixels of the second pass, square.
        steps: That the first pass runs.
        hires_steps: That the second pass runs.
        strength: Of the second pass.
        guidance: Classifier-free guidance scale.
        vae: Folder of another model, whose VAE is used; empty for its own.
    """

    model: str
    source: str
    cache: str
    side: int = 256
    hires_side: int = 384
    steps: int = 20
    hires_steps: int = 10
    strength: float = 0.5
    guidance: float = 7.5
    vae: str = ""

    @property
    def schedule(self) -> int:
        """Length of the second pass's schedule, of which `strength` is `hires_steps` steps."""
        return round(self.hires_steps / self.strength)


class Command(msgspec.Struct, frozen=True):
    """
    What a worker is to do.

    Attributes:
        do: Name of one of its system's methods.
        arguments: Of that method.
    """

    do: str
    arguments: dict[str, int | str] = {}


class Answer(msgspec.Struct, frozen=True):
    """
    What it took.

    Attributes:
        wall: Seconds.
        cpu: CPU seconds of the process and its children, user and system.
        cpu_total: The same since the process was started.
        peak: Largest resident set of the process so far, in bytes.
        result: What the method returned.
    """

    wall: float
    cpu: float
    cpu_total: float
    peak: int
    result: dict[str, float] = {}

"""
A Gradio page: both passes, a live preview, progress, and a cancel that keeps the first pass.

Run it with `python gradio_host.py`.
"""

import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from holdfast.engine import Engine, Hires, HoldfastError, Job, Preview, Result

PROMPT = "a large red circle on a blue background"


def page(engine: Engine) -> gr.Blocks:
    """Build the page on an engine."""
    jobs: dict[str, Job[Result]] = {}

    def generate(prompt: str, seed: int, steps: int, request: gr.Request) -> Iterator[Any]:
        job = engine.submit(Hires(prompt=prompt, seed=int(seed), steps=int(steps), scale=2.0))
        jobs[str(request.session_hash)] = job
        newest: dict[str | None, Preview] = {}
        unsubscribe = engine.subscribe(
            lambda seen: newest.update({seen.request_id: seen}), [Preview]
        )

        def images() -> tuple[Any, Any]:
            preview = newest.get(job.request_id)
            return preview and preview.image.resize((256, 256)), job.kept[0] if job.kept else None

        try:
            while not job.done():
                yield *images(), None, words(job)
                time.sleep(0.1)
            yield *images(), job.result().images[0], words(job)
        except HoldfastError as error:
            yield *images(), None, str(error)
        finally:
            unsubscribe()

    def cancel(request: gr.Request) -> None:
        if (job := jobs.get(str(request.session_hash))) is not None:
            job.cancel(keep="first_pass")

    blocks = gr.Blocks(title="Holdfast", analytics_enabled=False)
    with blocks:
        with gr.Row():
            prompt = gr.Textbox(PROMPT, label="Prompt", scale=4)
            seed = gr.Number(7, label="Seed", precision=0)
            steps = gr.Slider(1, 100, 20, step=1, label="Steps")
        with gr.Row():
            go, stop = gr.Button("Generate", variant="primary"), gr.Button("Cancel")
        said = gr.Textbox(label="Status", interactive=False)
        with gr.Row():
            names = ("Preview", "First pass", "Second pass")
            shown = [gr.Image(label=name, height=300, format="png") for name in names]
        go.click(generate, [prompt, seed, steps], [*shown, said], show_progress="hidden")
        stop.click(cancel)
    return blocks


def words(job: Job[Result]) -> str:
    """Say where a job stands."""
    if job.done():
        return job.status
    left = job.progress.remaining_seconds
    said = f"{job.status}: {job.progress.phase}, {job.progress.fraction:.0%}"
    return f"{said}, {left:.0f} s to go" if left else said


if __name__ == "__main__":
    with Engine("demo") as served:
        page(served).launch()

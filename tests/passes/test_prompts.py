from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from holdfast.engine import Engine, Hires, Txt2Img
from holdfast.engine.demo import model_folder
from holdfast.engine.errors import InvalidRequest
from holdfast.engine.imports import heavy, quiet
from tests.support.engines import opened, pipeline_of, pixels, record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    Chunks = list[list[tuple[str, float]]]

ROOM = 30
"""Places of a chunk of the demo model, whose text encoder reads 32 tokens at once."""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of textual inversion: one vector, several, and A1111's layout."""
    folder = tmp_path_factory.mktemp("words")
    rng = np.random.default_rng(3)
    for name, layout, count in (("ink", "<ink>", 1), ("two inks", "emb_params", 3)):
        rows = rng.standard_normal((count, 128)).astype(np.float32) * 0.02
        save_file({layout: rows}, folder / f"{name}.safetensors")
    save_file({"emb_params": np.ones((1, 9), np.float32)}, folder / "alien.safetensors")
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Iterator[Engine]:
    """An engine on the demo model, whose text encoder is a trained one, in float32."""
    folder = tmp_path_factory.mktemp("demo")
    settings = {"precision": "f32", "cache_dir": folder, "embeddings": words}
    with opened(settings, folder) as engine:
        engine.load("img2img")
        engine.run(Txt2Img(prompt="a dog", steps=1, seed=1))
        yield engine


@pytest.fixture(scope="module")
def reference() -> Any:
    """The same model in PyTorch."""
    heavy()
    import diffusers

    with quiet():
        return diffusers.StableDiffusionPipeline.from_pretrained(
            model_folder(), safety_checker=None, torch_dtype=torch.float32
        )


def told(engine: Engine, prompt: str, **fields: Any) -> list[list[tuple[float, np.ndarray]]]:
    """Return for each step the share and rows of each branch, as the denoiser is told them."""
    service = engine._service
    request = Txt2Img(prompt=prompt, seed=1, **{"steps": 2, **fields})
    (spec,) = service._settle(request, (1,))
    view = pipeline_of(engine).view_in_service()
    _, found = service._prompts.encode(spec, view, pipeline_of(engine).model)
    return [[(s, rows["prompt_embeds"].numpy()) for s, rows in step] for step in found.positive]


def expected(pipeline: Any, chunks: Chunks, clip_skip: int = 1) -> np.ndarray:
    """Encode chunks of weighted texts as A1111 does, in PyTorch."""
    tokenizer, encoder, rows = pipeline.tokenizer, pipeline.text_encoder, []
    for chunk in chunks:
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for text, weight in chunk:
            found = tokenizer(text, add_special_tokens=False).input_ids
            ids += found
            weights += [weight] * len(found)
        left = ROOM + 1 - len(ids)
        ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * left
        weights += [1.0] * (left + 1)
        with torch.no_grad():
            states = encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states
            z = encoder.text_model.final_layer_norm(states[-clip_skip])
        weighed = z * torch.tensor(weights)[None, :, None]
        rows.append(weighed * z.mean() / weighed.mean())
    whole: np.ndarray = torch.cat(rows, 1).numpy()
    return whole


CASES: dict[str, tuple[str, Chunks]] = {
    "plain": ("a large red circle", [[("a large red circle", 1)]]),
    "weights": ("a (red:1.4) [circle]", [[("a", 1), ("red", 1.4), ("circle", 1 / 1.1)]]),
    "nested": ("a ((red)) (circle:0)", [[("a", 1), ("red", 1.21), ("circle", 0)]]),
    "break": ("a red BREAK (blue:0.6) dot", [[("a red", 1)], [("blue", 0.6), ("dot", 1)]]),
    "empty": ("", [[]]),
    "long": ("red " * 35, [[("red " * 30, 1)], [("red " * 5, 1)]]),
    "near comma": (
        "red " * 20 + ", " + "blue " * 12, [[("red " * 20 + ",", 1)], [("blue " * 12, 1)]],
    ),
    "far comma": (
        "red " * 5 + ", " + "blue " * 26,
        [[("red " * 5 + ", " + "blue " * 24, 1)], [("blue " * 2, 1)]],
    ),
    "comma next": (
        "(red :1.2)" * 30 + ", (blue:0.5)", [[("red " * 30, 1.2)], [(",", 1), ("blue", 0.5)]],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("prompt", "chunks"), CASES.values(), ids=CASES)
def test_rows_are_those_of_the_equation(
    demo: Engine, reference: Any, prompt: str, chunks: Chunks
) -> None:
    """Weights, breaks and chunks give what a reference in PyTorch gives, to rounding."""
    for step in told(demo, prompt):
        ((share, rows),) = step
        assert share == 1
        np.testing.assert_allclose(rows, expected(reference, chunks), atol=1e-4)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_earlier_layers_are_read(demo: Engine, reference: Any, clip_skip: int) -> None:
    """clip_skip=2 reads the last layer but one, normalised as the last is."""
    (((_, rows),), _) = told(demo, "a red circle", clip_skip=clip_skip)
    wanted = expected(reference, [[("a red circle", 1)]], clip_skip)
    np.testing.assert_allclose(rows, wanted, atol=1e-4)


def test_a_layer_that_is_not_there_is_refused(demo: Engine) -> None:
    """A clip_skip beyond the layers of the text encoder says so."""
    with pytest.raises(InvalidRequest, match="not as many layers"):
        demo.run(Txt2Img(prompt="a", clip_skip=30, steps=1))


def test_prompts_of_both_signs_are_equally_long(demo: Engine) -> None:
    """A short prompt beside a long negative one is filled up with empty chunks, and the reverse."""
    service = demo._service
    request = Txt2Img(prompt="red", negative_prompt="blue " * 70, seed=1, steps=1)
    (spec,) = service._settle(request, (1,))
    view = pipeline_of(demo).view_in_service()
    _, found = service._prompts.encode(spec, view, pipeline_of(demo).model)
    assert {tuple(row.shape) for row in found.first.values()} == {(1, 96, 128)}


def test_embeddings_stand_where_they_are_called(demo: Engine, reference: Any, words: Path) -> None:
    """An embedding's vectors take the places of its name, of any case, with the weight there."""
    from safetensors.numpy import load_file

    table = reference.text_encoder.get_input_embeddings()
    files = {"ink": "<ink>", "two inks": "emb_params"}
    extra = np.concatenate([load_file(words / f"{n}.safetensors")[k] for n, k in files.items()])
    first = table.weight.shape[0]
    tokenizer = reference.tokenizer
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [start, *tokenizer("a red", add_special_tokens=False).input_ids, first]
    ids += [*tokenizer(",", add_special_tokens=False).input_ids, first + 1, first + 2, first + 3]
    weights = [1, 1, 1, 1.3, 1, 0.5, 0.5, 0.5] + [1] * (32 - len(ids))
    ids += [end] * (32 - len(ids))
    plain = torch.nn.functional.embedding

    def look_up(tokens: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        whole = torch.cat([weight, torch.from_numpy(extra)]) if weight is table.weight else weight
        return plain(tokens, whole, *rest)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "embedding", look_up)
        z = reference.text_encoder(torch.tensor([ids])).last_hidden_state
    weighed = z * torch.tensor(weights)[None, :, None]
    (((_, rows),), _) = told(demo, "a red (INK:1.3), (embedding:two inks:0.5)")
    np.testing.assert_allclose(rows, weighed * z.mean() / weighed.mean(), atol=1e-4)


def test_an_embedding_of_another_model_is_refused(demo: Engine) -> None:
    """Vectors of another width than the text encoder's say for which it was made."""
    with pytest.raises(InvalidRequest, match="alien was made for text encoders of width 9"):
        demo.run(Txt2Img(prompt="an alien", steps=1))


def test_nothing_of_a_prompt_compiles(demo: Engine) -> None:
    """On dynamic shapes weights, length, composition, schedules and embeddings compile nothing."""
    since = record(demo)
    for prompt in ("(red:1.5) " * 50, "red AND blue", "[red|blue]", "[red:blue:1]", "ink"):
        assert not demo.plan(Txt2Img(prompt=prompt)).steps
        demo.run(Txt2Img(prompt=prompt, steps=2, seed=1))
    assert not since.compiled


def images(pipeline: Any, **arguments: Any) -> np.ndarray:
    with quiet():
        made = pipeline(
            num_inference_steps=4, guidance_scale=3.0, width=64, height=64, output_type="np",
            generator=torch.Generator().manual_seed(5), **arguments,
        )  # fmt: skip
    found: np.ndarray = made.images[0] * 255
    return found


def drawn(engine: Engine, prompt: str, **fields: Any) -> np.ndarray:
    fields = {"steps": 4, "guidance": 3.0, "seed": 5, "width": 64, "height": 64, **fields}
    return np.asarray(engine.run(Txt2Img(prompt=prompt, **fields)).images[0], np.float32)


def near(image: np.ndarray, other: np.ndarray) -> bool:
    return float(np.abs(image - other).mean()) < 1


def test_images_are_those_of_diffusers_on_the_same_rows(demo: Engine, reference: Any) -> None:
    """A weighted prompt of two chunks draws what diffusers draws from the reference's rows."""
    text = [[("a large", 1), ("red", 1.4), ("circle", 1)], [("on a blue background", 1)]]
    made = images(
        reference,
        prompt_embeds=torch.from_numpy(expected(reference, text)),
        negative_prompt_embeds=torch.from_numpy(expected(reference, [[], []])),
    )
    prompt = "a large (red:1.4) circle BREAK on a blue background"
    assert near(drawn(demo, prompt), made)
    assert not near(drawn(demo, "a small green dog"), made)


@pytest.mark.parametrize(
    ("prompt", "steps"),
    [
        ("a [red:blue:1] circle", ["red", "blue", "blue", "blue"]),
        ("a [red:blue:0.75] circle", ["red", "red", "red", "blue"]),
        ("a [red|blue] circle", ["red", "blue", "red", "blue"]),
    ],
)
def test_each_step_is_told_its_own_prompt(
    demo: Engine, reference: Any, prompt: str, steps: list[str]
) -> None:
    """A scheduled prompt draws what diffusers draws where a callback changes the rows."""
    rows = {c: torch.from_numpy(expected(reference, [[(f"a {c} circle", 1)]])) for c in steps}
    empty = torch.from_numpy(expected(reference, [[]]))

    def change(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        following = steps[min(step + 1, len(steps) - 1)]
        return {**tensors, "prompt_embeds": torch.cat([empty, rows[following]])}

    made = images(
        reference, prompt_embeds=rows[steps[0]], negative_prompt_embeds=empty,
        callback_on_step_end=change, callback_on_step_end_tensor_inputs=["latents"],
    )  # fmt: skip
    assert near(drawn(demo, prompt), made)


def test_what_and_composes_is_the_equations(
    demo: Engine, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    AND draws what diffusers draws where each evaluation is that of Liu et al. 2022
    (arXiv:2206.01714, equation 11): a sum of weighted differences from the prediction without.
    """
    second, share = torch.from_numpy(expected(reference, [[("a red star", 1)]])), 0.6
    predict = reference.unet.forward

    def composed(sample: torch.Tensor, at: Any, rows: torch.Tensor, **more: Any) -> Any:
        three = predict(sample[:1].repeat(3, 1, 1, 1), at, torch.cat([rows, second]), **more)
        without, one, other = three[0].split(1)
        whole = without + (one - without) + share * (other - without)
        return (torch.cat([without, whole]),)

    def forward(sample: Any, at: Any, *, encoder_hidden_states: Any, **more: Any) -> Any:
        return composed(sample, at, encoder_hidden_states, **more)

    monkeypatch.setattr(reference.unet, "forward", forward)
    made = images(
        reference,
        prompt_embeds=torch.from_numpy(expected(reference, [[("a red circle", 1)]])),
        negative_prompt_embeds=torch.from_numpy(expected(reference, [[]])),
    )
    assert near(drawn(demo, "a red circle AND a red star :0.6"), made)
    assert not near(drawn(demo, "a red circle AND a red star"), made)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle :0.5 AND a red circle :0.5",
        "a red circle :0.5 AND a red circle :0.25 AND a red circle :0.25",
        "a blue dog :0 AND a red circle",
        "a star :0 AND a blue dog :0 AND a red circle",
    ],
)
def test_shares_of_one_picture_are_that_picture(demo: Engine, prompt: str) -> None:
    """What AND composes of one prompt in parts, or beside others of no share, is its own image."""
    assert np.array_equal(drawn(demo, prompt), drawn(demo, "a red circle"))
    assert not near(drawn(demo, "a red circle AND a blue dog"), drawn(demo, "a red circle"))


def test_composing_needs_guidance(demo: Engine) -> None:
    """AND without guidance is refused, before anything is drawn."""
    with pytest.raises(InvalidRequest, match="guidance is off"):
        demo.run(Txt2Img(prompt="a AND b", guidance=1.0, steps=1))


def test_plain_mode_draws_brackets_as_text(demo: Engine) -> None:
    """The syntax is changed without a compile, and then brackets are words."""
    since = record(demo)
    demo.configure(prompt_syntax="plain")
    try:
        (((_, rows),), _) = told(demo, "a (red:1.4) circle")
    finally:
        demo.configure(prompt_syntax="a1111")
    ((_, weighed),) = told(demo, "a (red:1.4) circle")[0]
    ((_, escaped),) = told(demo, r"a \(red\:1.4\) circle")[0]
    assert np.array_equal(rows, escaped)
    assert not np.array_equal(rows, weighed)
    assert not since.compiled


def test_a_swap_may_lie_in_the_second_pass(demo: Engine) -> None:
    """In a hires run 1 is where the first pass ends: what is swapped there is the second's."""

    def run(prompt: str, hires_prompt: str | None = None) -> str:
        return pixels(demo.run(Hires(
            prompt=prompt, hires_prompt=hires_prompt, steps=2, hires_steps=4, seed=3, width=64,
            height=64, scale=1.5,
        )))  # fmt: skip

    assert run("a [red:blue:1.0] circle") == run("a red circle", "a blue circle")
    assert run("a [red:blue:1.5] circle") != run("a red circle", "a blue circle")


@pytest.fixture
def tagged(settings: dict[str, Any], ink: Path, tmp_path: Path) -> Iterator[Engine]:
    """An engine with a folder of LoRAs in which there is one."""
    folder = tmp_path / "loras" / "styles"
    folder.mkdir(parents=True)
    (folder / "ink.safetensors").symlink_to(ink)
    with opened({**settings, "lora_dir": folder.parent}, tmp_path) as engine:
        yield engine


def test_a_tag_is_a_lora_of_its_pass(tagged: Engine, ink: Path) -> None:
    """A tag draws what the LoRA given as such draws; in the hires prompt, in that pass alone."""
    from holdfast.engine import Lora

    def run(**fields: Any) -> str:
        fields = {"steps": 2, "seed": 1, "width": 64, "height": 64, **fields}
        return pixels(tagged.run(Hires(**fields, scale=1.5)))

    both = run(prompt="a dog", lora=(Lora(ink, 0.8),))
    assert run(prompt="a <lora:ink:0.8>dog") == run(prompt="<lyco:INK:0.8:0.8>a dog") == both
    second = run(prompt="a dog", hires_prompt="a dog<lora:ink:0.8>")
    assert second == run(prompt="a dog", hires_lora=(Lora(ink, 0.8),))
    assert len({both, second, run(prompt="a dog")}) == 3


WRONG: dict[str, tuple[str, str]] = {
    "unknown": ("<lora:inc:1>", "Did you mean ink?"),
    "nothing near": ("<lora:zzz>", "Check the name"),
    "no number": ("<lora:ink:strong>", "Write <lora:name:weight>"),
    "too much": ("<lora:ink:1:1:1>", "Write <lora:name:weight>"),
    "too strong": ("<lora:ink:99>", "weight"),
    "hypernetwork": ("<hypernet:ink:1>", "no hypernetworks"),
}


def test_a_tag_that_names_nothing_is_refused(tagged: Engine) -> None:
    """An unknown name is an error with those that are near; a wrong form says the right one."""
    for prompt, says in WRONG.values():
        with pytest.raises(InvalidRequest, match=says):
            tagged.plan(Txt2Img(prompt=f"a dog {prompt}"))
    with pytest.raises(InvalidRequest, match="adds no LoRA where it stands"):
        tagged.run(Txt2Img(prompt="a dog", negative_prompt="<lora:ink:1>"))
    tagged.configure(lora_dir=None)
    with pytest.raises(InvalidRequest, match="no lora_dir"):
        tagged.plan(Txt2Img(prompt="<lora:ink:1>"))
    tagged.configure(prompt_syntax="plain")
    with pytest.raises(InvalidRequest, match="adds no LoRA where it stands"):
        tagged.run(Txt2Img(prompt="<lora:ink:1>"))


def test_on_static_shapes_a_longer_prompt_is_another_shape(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """A change of the number of chunks recompiles the denoiser, and the plan says why."""
    with opened({**settings, "shapes": "static"}, tmp_path) as engine:
        short = Txt2Img(prompt="a dog", steps=1, seed=1, width=64, height=64)
        engine.run(short)
        longer = short.but(prompt="dog " * 100)
        plan = engine.plan(longer)
        assert plan.compiles == ("unet",)
        assert "tokens: 77 -> 154" in {step.reason for step in plan.steps}
        engine.run(longer)
        assert not engine.plan(short).compiles

from __future__ import annotations

import asyncio
import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from PIL import Image

from holdfast.engine import Bounds, Cancelled, Img2Img, Lora, Txt2Img
from holdfast.engine.server import Studio

from .conftest import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from holdfast.engine import Engine

PROMPT = "a large red circle on a blue background"
FEW = {"num_inference_steps": 2, "rng_seed": 7}


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    """What programs use: ``openai``."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=PATIENCE) as client:
        yield client


def picture(text: str | None) -> Image.Image:
    with Image.open(io.BytesIO(base64.b64decode(text or ""))) as image:
        image.load()
        return image


def file(image: Image.Image) -> tuple[str, bytes, str]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "image.png", buffer.getvalue(), "image/png"


def test_a_generation_is_the_engines_own_image(client: Any, engine: Engine) -> None:
    """Each image of `n` is, to the bit, what the engine makes of the same wish."""
    made = client.images.generate(prompt=PROMPT, n=2, size="64x64", extra_body=FEW)
    own = engine.run(Txt2Img(prompt=PROMPT, width=64, height=64, steps=2, seed=7, batch=2))
    images = [picture(each.b64_json).tobytes() for each in made.data]
    assert images == [each.tobytes() for each in own.images]
    assert (made.size, made.usage.total_tokens) == ("64x64", 0)
    assert client.models.list().data[0].id == engine.model_facts().name


@pytest.mark.parametrize(("form", "name"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_a_chat_sends_what_it_always_sends(client: Any, form: str, name: str) -> None:
    """A model of OpenAI's, a quality, a background and a size of ``auto`` get an image."""
    made = client.images.generate(
        prompt=PROMPT, model="gpt-image-1", size="auto", quality="high", background="opaque",
        moderation="auto", output_format=form, output_compression=80, user="somebody",
        extra_body=FEW,
    )  # fmt: skip
    assert picture(made.data[0].b64_json).format == name


GENERATIONS: dict[str, dict[str, Any]] = {
    "open webui": {"model": "gpt-image-1", "prompt": PROMPT, "n": 1, "size": "64x64"},
    "open webui, another model": {"model": "dall-e-2", "prompt": PROMPT, "n": 1, "size": "64x64",
                                  "response_format": "b64_json"},
    "librechat": {"model": "gpt-image-1", "prompt": PROMPT, "n": 1, "quality": "auto",
                  "size": "auto", "background": "auto", "user": "66e1"},
    "openvino": {"model": "", "prompt": PROMPT, "size": "64x64", "rng_seed": 45,
                 "negative_prompt": "blue", "guidance_scale": 4.5},
}  # fmt: skip


@pytest.mark.parametrize("program", GENERATIONS)
@pytest.mark.parametrize("root", ["v1", "v3"])
def test_what_programs_send_is_served(program: str, root: str, address: str) -> None:
    """What each program's source sends gets one image."""
    body = {**GENERATIONS[program], "num_inference_steps": 2}
    answer = httpx.post(f"{address}/{root}/images/generations", json=body, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    assert [picture(each["b64_json"]).size for each in answer.json()["data"]] == [(64, 64)]


@pytest.mark.parametrize("part", ["image", "image[]"])
def test_what_programs_upload_is_edited(part: str, address: str) -> None:
    """Open WebUI and LibreChat send forms with the image under one of two names."""
    fields = {"model": "gpt-image-1", "prompt": PROMPT, "n": "1", "size": "64x64",
              "quality": "auto", "background": "auto", "num_inference_steps": "2"}  # fmt: skip
    upload = {part: file(Image.new("RGB", (64, 64), "red"))}
    path = f"{address}/v1/images/edits?api-version=2025-04-01"
    answer = httpx.post(path, data=fields, files=upload, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    assert picture(answer.json()["data"][0]["b64_json"]).size == (64, 64)


def test_an_upload_is_edited_at_the_nearest_size(client: Any) -> None:
    """An upload of any size is brought to what the model can make, as one part or a list."""
    upload = Image.new("RGB", (70, 61), "red")
    for image in (file(upload), [file(upload)]):
        made = client.images.edit(image=image, prompt=PROMPT, extra_body=FEW)
        assert picture(made.data[0].b64_json).size == (64, 64)


def test_a_photo_is_brought_within_bounds(engine: Engine) -> None:
    """Drawn over at no size in particular, it is made smaller, at its aspect, and that is told."""
    studio = Studio(engine, Bounds(pixels=80 * 64))
    url = (
        f"data:image/png;base64,{base64.b64encode(file(Image.new('RGB', (400, 200)))[1]).decode()}"
    )
    order = asyncio.run(studio.order({"kind": "img2img", "image": url}))
    studio.close()
    assert isinstance(order.request, Img2Img)
    assert order.request.size == (96, 48)
    assert [(each.asked, each.given) for each in order.told] == [("400x200", "96x48")]


def test_what_is_done_otherwise_is_told(client: Any) -> None:
    """A header has it, as the answer has no place for it."""
    asked = client.images.with_raw_response.generate(prompt=PROMPT, size="70x61", extra_body=FEW)
    assert asked.headers["x-holdfast-otherwise"] == "size: 70x61 -> 64x64"
    assert asked.parse().size == "64x64"


def test_a_model_is_found_by_its_names(client: Any, engine: Engine, ink: Path) -> None:
    """It has its own name and its aliases, which add a LoRA; another one is not found."""
    names = [engine.model_facts().name, "in ink"]
    assert [each.id for each in client.models.list()] == names
    assert [client.models.retrieve(each).id for each in names] == names
    made = client.images.generate(model="in ink", prompt=PROMPT, size="64x64", extra_body=FEW)
    own = engine.run(
        Txt2Img(prompt=PROMPT, width=64, height=64, steps=2, seed=7, lora=(Lora(ink, 0.8),))
    )
    assert picture(made.data[0].b64_json).tobytes() == own.images[0].tobytes()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dream")


def test_a_request_may_be_fast(client: Any, engine: Engine) -> None:
    """``speed`` is the engine's own."""
    fast = {"num_inference_steps": 8, "rng_seed": 7, "speed": "fast", "guidance_scale": 4,
            "negative_prompt": "blue"}  # fmt: skip
    made = client.images.generate(prompt=PROMPT, size="64x64", extra_body=fast)
    own = engine.run(
        Txt2Img(
            prompt=PROMPT, width=64, height=64, steps=8, seed=7, speed="fast", guidance=4,
            negative_prompt="blue",
        )
    )  # fmt: skip
    assert picture(made.data[0].b64_json).tobytes() == own.images[0].tobytes()


def test_a_stream_that_fails_says_so(client: Any) -> None:
    """What turns out once the stream is open is an event, which the client raises."""
    with pytest.raises(openai.APIError, match="nobody"):
        list(client.images.generate(prompt="<lora:nobody>", size="64x64", stream=True))


def test_a_stream_that_is_left_stops_its_job(client: Any, studio: Studio) -> None:
    """Once nobody reads the events, the engine draws no further."""
    steps = {"num_inference_steps": 500, "rng_seed": 7}
    with client.images.edit(
        image=file(Image.new("RGB", (64, 64), "red")), prompt=PROMPT, stream=True,
        partial_images=3, extra_body={**steps, "strength": 1.0},
    ) as stream:  # fmt: skip
        assert next(iter(stream)).type == "image_edit.partial_image"
        (job,) = studio.jobs()
    with pytest.raises(Cancelled):
        job.result(timeout=PATIENCE)


def test_what_is_transparent_in_the_mask_is_edited(client: Any) -> None:
    """The rest stays to the bit, but for where the edge is softened."""
    image = Image.new("RGB", (64, 64), "red")
    mask = Image.new("RGBA", (64, 64), "black")
    mask.paste((0, 0, 0, 0), (0, 0, 16, 64))
    made = client.images.edit(image=file(image), mask=file(mask), prompt=PROMPT, extra_body=FEW)
    edited = picture(made.data[0].b64_json)
    kept = (48, 0, 64, 64)
    assert edited.crop(kept).tobytes() == image.crop(kept).tobytes()
    assert edited.tobytes() != image.tobytes()
    made = client.images.edit(
        image=file(image), mask=file(mask), prompt=PROMPT, size="96x96", extra_body=FEW
    )
    edited = picture(made.data[0].b64_json)
    assert edited.size == (96, 96)
    assert edited.crop((72, 0, 96, 96)).tobytes() == Image.new("RGB", (24, 96), "red").tobytes()
    with pytest.raises(openai.BadRequestError, match="transparent"):
        client.images.edit(image=file(image), mask=file(image), prompt=PROMPT)


def test_what_is_no_json_names_no_field(address: str) -> None:
    """Nor does a form without an image name another than that."""
    head = {"content-type": "application/json"}
    answer = httpx.post(f"{address}/v1/images/generations", content=b"{prompt", headers=head)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, None)
    answer = httpx.post(f"{address}/v1/images/edits", data={"prompt": "x"}, files={"y": b"z"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")


def test_nothing_is_mixed_up(client: Any, engine: Engine) -> None:
    """Of many requests at once, each gets the image of its own seed, to the bit."""

    def ask(seed: int) -> bytes:
        extra = {"num_inference_steps": 2, "rng_seed": seed}
        made = client.images.generate(prompt=PROMPT, size="64x64", extra_body=extra)
        return picture(made.data[0].b64_json).tobytes()

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(12)))
    small = Txt2Img(prompt=PROMPT, width=64, height=64, steps=2)
    alone = [engine.run(small.but(seed=seed)).images[0].tobytes() for seed in range(12)]
    assert together == alone


def test_a_stream_ends_with_the_image(client: Any) -> None:
    """Partial images come in order, and the last event has the whole one."""
    steps = {"num_inference_steps": 60, "rng_seed": 7}
    with client.images.generate(
        prompt=PROMPT, size="64x64", stream=True, partial_images=2, extra_body=steps
    ) as stream:
        events = list(stream)
    *partial, last = events
    assert [each.partial_image_index for each in partial] == list(range(len(partial)))
    assert last.type == "image_generation.completed"
    assert picture(last.b64_json).size == (64, 64)


WRONG: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str | None]] = {
    "model": ({"model": "dream"}, openai.NotFoundError, "model"),
    "size": ({"size": "big"}, openai.BadRequestError, "size"),
    "number": ({"n": 11}, openai.BadRequestError, "n"),
    "address": ({"response_format": "url"}, openai.BadRequestError, "response_format"),
    "format": ({"output_format": "gif"}, openai.BadRequestError, "output_format"),
    "background": ({"background": "transparent"}, openai.BadRequestError, "background"),
    "stream": ({"stream": True, "size": "9x"}, openai.BadRequestError, "size"),
    "sides": ({"size": "0x64"}, openai.BadRequestError, "size"),
    "steps": (
        {"extra_body": {"num_inference_steps": 1001}},
        openai.BadRequestError,
        "num_inference_steps",
    ),
    "type": ({"extra_body": {"guidance_scale": "much"}}, openai.BadRequestError, "guidance_scale"),
    "lora": ({"prompt": "<lora:nobody>"}, openai.BadRequestError, None),
    "work": ({"size": "4096x4096"}, openai.BadRequestError, None),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_named(client: Any, case: str) -> None:
    """The client raises what it raises of OpenAI, with the field, and does not try again."""
    fields, kind, param = WRONG[case]
    with pytest.raises(kind) as raised:
        client.images.generate(**{"prompt": PROMPT, **fields})
    assert raised.value.body["param"] == param
    assert raised.value.body["type"] == "invalid_request_error"

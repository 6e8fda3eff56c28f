from __future__ import annotations

import base64
import io
import json
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import webuiapi
from PIL import Image

from holdfast.engine import Engine, Hires, Inpaint, Lora, Txt2Img, errors
from holdfast.engine.server.fields import AskedImg2Img, AskedTxt2Img

from .conftest import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.engine.server import Studio

    Post = Callable[..., httpx.Response]

PROMPT = "a large red circle on a blue background"
RED = Image.new("RGB", (64, 64), "red")
TXT2IMG, IMG2IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
SMALL = {"prompt": PROMPT, "steps": 2, "width": 64, "height": 64, "seed": 7}


def b64(image: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def logged(engine: Engine, name: str) -> list[dict[str, Any]]:
    """Return the events of a name in an engine's log."""
    assert engine.config.log_file is not None
    lines = engine.config.log_file.read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def picture(text: str) -> Image.Image:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return image.convert("RGB")


@pytest.fixture
def client(address: str) -> Any:
    """What scripts use: ``webuiapi``."""
    return webuiapi.WebUIApi(baseurl=f"{address}/sdapi/v1")


def test_webuiapi_gets_the_engines_own_images(client: Any, engine: Engine) -> None:
    """A batch and a hires fix are, to the bit, what the engine makes of the same wish."""
    made = client.txt2img(
        prompt=PROMPT, seed=7, steps=2, width=64, height=64, batch_size=2, cfg_scale=5,
        sampler_name="Euler", alwayson_scripts={},
    )  # fmt: skip
    right = Txt2Img(
        prompt=PROMPT, seed=7, steps=2, width=64, height=64, batch=2, guidance=5, scheduler="euler"
    )
    own = engine.run(right)
    assert [each.tobytes() for each in made.images] == [each.tobytes() for each in own.images]
    assert made.info["all_seeds"] == [7, 8]
    assert made.info["infotexts"] == list(own.infotexts)
    read = client.png_info(made.images[0])
    assert read.info == own.infotexts[0]

    made = client.txt2img(
        prompt=PROMPT, seed=7, steps=2, width=64, height=64, enable_hr=True, hr_scale=1.3,
        hr_upscaler=webuiapi.HiResUpscaler.Latent, denoising_strength=0.6,
        sampler_name="Euler a", alwayson_scripts={},
    )  # fmt: skip
    own = engine.run(
        Hires(
            prompt=PROMPT, seed=7, steps=2, width=64, height=64, hires_width=80, hires_height=80,
            upscaler="latent", strength=0.6, scheduler="euler-a",
        )
    )  # fmt: skip
    assert made.image.tobytes() == own.images[0].tobytes()
    told = made.info["extra_generation_params"]
    assert told["hires size"] == "83x83 -> 80x80"


def test_webuiapi_asks_all_that_it_can(client: Any, post: Post, engine: Engine) -> None:
    """Every list, option and utility of the client has an answer of the kind that it reads."""
    facts = engine.model_facts()
    title = f"{facts.name} [{facts.fingerprint[:10]}]"
    assert client.util_get_current_model() == title
    assert client.util_get_model_names() == [title]
    client.util_set_model(facts.name)
    assert (
        post("/sdapi/v1/options", {**client.get_options(), "samples_format": "jpg"}).text == "null"
    )
    assert post("/sdapi/v1/options", {"sd_model_checkpoint": "dream"}).status_code == 404
    client.util_wait_for_ready()
    assert client.get_options()["sd_model_checkpoint"] == title
    assert "Euler a" in client.util_get_sampler_names()
    assert client.get_upscalers()[0]["name"] == "None"
    assert {"name": "Latent"} in client.get_latent_upscale_modes()
    assert [each["name"] for each in client.get_loras()] == ["ink"]
    assert client.get_memory()["ram"]["total"] > 0
    for name in ("scripts", "embeddings", "cmd_flags", "hypernetworks", "face_restorers",
                 "realesrgan_models", "prompt_styles", "schedulers"):  # fmt: skip
        assert getattr(client, f"get_{name}")() is not None, name
    for wrong, status in (
        ({"upscaler_1": "R-ESRGAN 4x+"}, 400), ({"gfpgan_visibility": 1}, 422),
        ({"image": "/etc/hostname"}, 422), ({"upscaling_resize": 10**6}, 422),
    ):  # fmt: skip
        body = {"image": b64(RED), **wrong}
        assert post("/sdapi/v1/extra-single-image", body).status_code == status
    enlarged = client.extra_single_image(RED, upscaler_1="Lanczos", upscaling_resize=1.5)
    assert enlarged.image.size == (96, 96)
    assert client.get_loras()[0] == {"name": "ink", "alias": "ink", "path": "ink.safetensors",
                                     "metadata": {}}  # fmt: skip
    assert client.get_upscalers()[0]["name"] == "None"
    client.interrupt()
    client.skip()
    client.refresh_checkpoints()
    assert post("/sdapi/v1/unload-checkpoint", "").json() == {}
    assert engine.state.value == "unloaded"
    assert post("/sdapi/v1/reload-checkpoint", "").json() == {}
    assert engine.state.value == "compiled-txt2img"


def test_webuiapi_paints_over_images_and_in_them(client: Any, engine: Engine) -> None:
    """Img2img keeps the size that the model can make; a mask leaves the rest to the bit."""
    made = client.img2img(
        images=[RED], prompt=PROMPT, seed=1, steps=2, width=64, height=64, denoising_strength=0.5,
        sampler_name="Euler", alwayson_scripts={},
    )  # fmt: skip
    assert made.image.size == (64, 64)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    made = client.img2img(
        images=[RED], mask_image=mask, mask_blur=0, prompt=PROMPT, seed=1, steps=2, width=64,
        height=64, inpaint_full_res=False, inpainting_fill=1, sampler_name="Euler",
        alwayson_scripts={},
    )  # fmt: skip
    right = (48, 0, 64, 64)
    assert made.image.convert("RGB").crop(right).tobytes() == RED.crop(right).tobytes()
    assert made.image.tobytes() != RED.tobytes()
    assert engine.state.value == "compiled-inpaint"


def test_a_mask_is_read_as_a1111_reads_it(post: Post, engine: Engine) -> None:
    """Of a mask with transparency, its alpha decides; the whole picture gets the size asked for."""
    alpha = Image.new("L", (64, 64))
    alpha.paste(255, (0, 0, 32, 64))
    mask = Image.new("RGBA", (64, 64), "black")
    mask.putalpha(alpha)
    body = {**SMALL, "init_images": [b64(RED)], "mask": b64(mask), "denoising_strength": 0.5}
    made = post(IMG2IMG, body).json()
    own = engine.run(
        Inpaint(**SMALL, image=RED, mask=alpha, strength=0.5, area="masked", fill="fill", padding=0)
    )
    assert picture(made["images"][0]).tobytes() == own.images[0].tobytes()

    whole = {**body, "inpaint_full_res": False, "inpainting_fill": 1, "width": 96, "height": 64,
             "resize_mode": 1}  # fmt: skip
    made = post(IMG2IMG, whole).json()
    assert picture(made["images"][0]).size == (96, 64)
    right = picture(made["images"][0]).crop((80, 0, 96, 64))
    assert right.tobytes() == Image.new("RGB", (16, 64), "red").tobytes()


SIZE = {"width": 64, "height": 64}
SAME: dict[str, tuple[dict[str, Any], type[Hires | Txt2Img], dict[str, Any]]] = {
    "sampler and schedule": (
        {"sampler_name": "DPM++ 2M", "scheduler": "Exponential"}, Txt2Img,
        {"scheduler": "dpm++2m-exponential"},
    ),
    "schedule behind the sampler": (
        {"sampler_index": "LMS Karras"}, Txt2Img, {"scheduler": "lms-karras"},
    ),
    "schedule alone": ({"scheduler": "karras"}, Txt2Img, {"scheduler": "euler-karras"}),
    "automatic": (
        {"sampler_name": "DPM++ 2M SDE", "scheduler": "Automatic"}, Txt2Img,
        {"scheduler": "dpm++2m-sde-exponential"},
    ),
    "clip skip of the settings": (
        {"override_settings": {"CLIP_stop_at_last_layers": "2"}}, Txt2Img, {"clip_skip": 2},
    ),
    "clip skip": ({"clip_skip": 2}, Txt2Img, {"clip_skip": 2}),
    "variation": (
        {"subseed": 9, "subseed_strength": 0.3, "seed_resize_from_w": 96,
         "seed_resize_from_h": 64},
        Txt2Img,
        {"variation_seed": 9, "variation_strength": 0.3, "seed_resize": (96, 64)},
    ),
    "eta": ({"sampler_name": "DDIM", "eta": 0.7}, Txt2Img, {"scheduler": "ddim", "eta": 0.7}),
    "eta of a sampler without": ({"sampler_name": "Euler", "eta": 0.7}, Txt2Img,
                                 {"scheduler": "euler"}),
    "eta of the first pass": (
        {"sampler_name": "DDIM", "eta": 0.7, "enable_hr": True, "hr_upscaler": "Lanczos",
         "hr_scale": 1.5, "hr_sampler_name": "Euler"},
        Hires,
        {"scheduler": "ddim", "eta": 0.7, "scale": 1.5, "upscaler": "lanczos",
         "hires_scheduler": "euler", "strength": 0.75},
    ),
    "weights": ({"prompt": "(red:1.4) circle"}, Txt2Img, {"prompt": "(red:1.4) circle"}),
    "speed": ({"speed": "fast", "steps": 8}, Txt2Img, {"speed": "fast", "steps": 8}),
    "n_iter": ({"batch_size": 1, "n_iter": 2, "cfg_scale": "3.5"}, Txt2Img,
               {"batch": 2, "guidance": 3.5}),
    "second pass": (
        {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Nearest", "hr_prompt": "a star",
         "hr_negative_prompt": "blue", "hr_cfg": 2, "hr_second_pass_steps": 3,
         "hr_sampler_name": "Use same sampler", "hr_scheduler": "Karras",
         "sampler_name": "Euler", "denoising_strength": 0.4},
        Hires,
        {"scale": 1.5, "upscaler": "nearest", "hires_prompt": "a star",
         "hires_negative_prompt": "blue", "hires_guidance": 2, "hires_steps": 3,
         "hires_scheduler": "euler-karras", "scheduler": "euler", "strength": 0.4},
    ),
    "target of another aspect": (
        {"enable_hr": True, "hr_resize_x": 96, "hr_resize_y": 64, "hr_upscaler": "None"}, Hires,
        {"hires_width": 96, "hires_height": 64, "upscaler": "lanczos", "strength": 0.75},
    ),
    "target in the old style": (
        {"enable_hr": True, "firstphase_width": 64, "firstphase_height": 64, "width": 96,
         "height": 96},
        Hires, {"hires_width": 96, "hires_height": 96, "upscaler": "latent", "strength": 0.75},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_a_field_is_the_engines_own(case: str, post: Post, engine: Engine) -> None:
    """What A1111's fields ask for is, to the bit, what the engine makes of its own."""
    sent, kind, own = SAME[case]
    answer = post(TXT2IMG, {**SMALL, **sent})
    assert answer.status_code == 200, answer.text
    result = engine.run(kind(**{**SMALL, **SIZE, **own}))
    made = [picture(each).tobytes() for each in answer.json()["images"]]
    assert made == [each.tobytes() for each in result.images]


def test_a_tag_of_the_second_pass_is_of_it_alone(post: Post, engine: Engine, ink: Path) -> None:
    """``<lora:...>`` in ``hr_prompt`` is the set of the second pass."""
    hires = {**SMALL, "enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Lanczos"}
    made = post(TXT2IMG, {**hires, "hr_prompt": f"{PROMPT} <lora:ink>"}).json()
    own = engine.run(
        Hires(**SMALL, scale=1.5, upscaler="lanczos", strength=0.75, hires_lora=(Lora(ink),))
    )
    assert picture(made["images"][0]).tobytes() == own.images[0].tobytes()


OTHERWISE: dict[str, tuple[str, dict[str, Any], str]] = {
    "restore_faces": (TXT2IMG, {"restore_faces": True}, "restore_faces"),
    "tiling": (TXT2IMG, {"tiling": True}, "tiling"),
    "refiner": (TXT2IMG, {"refiner_checkpoint": "r", "refiner_switch_at": 0.8},
                "refiner_checkpoint"),
    "vae": (TXT2IMG, {"override_settings": {"sd_vae": "mse.safetensors"}}, "sd_vae"),
    "schedule": (TXT2IMG, {"sampler_name": "Euler a", "scheduler": "Karras"}, "scheduler"),
    "schedule behind": (TXT2IMG, {"sampler_name": "Euler a Karras"}, "scheduler"),
    "another family's sampler": (TXT2IMG, {"sampler_name": "Euler FlowMatch"}, "sampler_name"),
    "size": (TXT2IMG, {"width": 70}, "size"),
    "mode": (IMG2IMG, {"resize_mode": 3}, "resize_mode"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_is_done_otherwise_is_told(case: str, post: Post, engine: Engine) -> None:
    """It is served, and stands in the answer and in the log."""
    path, sent, kind = OTHERWISE[case]
    answer = post(path, {**SMALL, "init_images": [b64(RED)], **sent})
    assert answer.status_code == 200, answer.text
    assert kind in json.loads(answer.json()["info"])["extra_generation_params"]
    assert logged(engine, "degradation")[-1]["kind"] == kind


def test_each_answer_is_a_line_of_the_log(address: str, post: Post, engine: Engine) -> None:
    """It has path, status and the request's name; of one refused, why; of a prompt, nothing."""
    post(f"{TXT2IMG}?x=secret", {**SMALL, "prompt": "a zebra"})
    post(TXT2IMG, {**SMALL, "sampler_name": "DPM fast"})
    post(TXT2IMG, {**SMALL, "steps": "a zebra"})
    httpx.get(f"{address}/sdapi/v1/nothing")
    httpx.get(f"{address}/sdapi/v1/options?")
    served, refused, invalid, unknown, looked = logged(engine, "http.answered")[-5:]
    assert (served["path"], served["status"], served["method"]) == (TXT2IMG, 200, "POST")
    assert served["request_id"] == logged(engine, "request.completed")[-1]["request_id"]
    assert (refused["status"], refused["level"]) == (404, "warning")
    assert "Sampler not found" in refused["error"]
    assert (invalid["status"], unknown["status"], looked["status"]) == (422, 404, 200)
    assert "steps" in invalid["error"]
    assert looked["level"] == "debug"
    assert engine.config.log_file is not None
    text = engine.config.log_file.read_text()
    assert "zebra" not in text
    assert "x=secret" not in text


def test_what_is_not_here_is_not_found(address: str) -> None:
    """Clients that look for extensions of A1111 find none."""
    for path in ("interrogate", "control"):
        assert httpx.post(f"{address}/sdapi/v1/{path}", json={}).status_code == 404
    assert httpx.get(f"{address}/controlnet/version").status_code == 404


PAYLOADS: dict[str, tuple[str, dict[str, Any]]] = {
    "open webui": (TXT2IMG, {
        "prompt": PROMPT, "batch_size": 1, "width": 64, "height": 64, "steps": 2,
        "negative_prompt": "blurry", "sampler_name": "DPM++ 2M", "scheduler": "Automatic",
        "cfg_scale": 6.5,
    }),
    "sillytavern": (TXT2IMG, {
        "url": "http://127.0.0.1:7860", "auth": "", "prompt": PROMPT, "negative_prompt": "",
        "sampler_name": "Euler a", "scheduler": "karras", "steps": 2, "cfg_scale": 7, "width": 64,
        "height": 64, "restore_faces": False, "enable_hr": True, "hr_upscaler": "Latent (bicubic)",
        "hr_scale": 1.5, "hr_additional_pass": None, "denoising_strength": 0.7,
        "hr_second_pass_steps": 0, "seed": -1, "clip_skip": 1, "save_images": True,
        "send_images": True, "do_not_save_grid": False, "do_not_save_samples": False,
        "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
        "override_settings_restore_afterwards": True,
    }),
    "librechat": (TXT2IMG, {
        "prompt": PROMPT, "negative_prompt": "ugly", "sampler_index": "DPM++ 2M Karras",
        "cfg_scale": 4.5, "steps": 2, "width": 64, "height": 64,
    }),
    "gimpfusion": (IMG2IMG, {
        "prompt": PROMPT, "negative_prompt": "", "seed": -1, "batch_size": 2, "steps": 2,
        "mask_blur": 4, "inpainting_fill": 1, "width": 64, "height": 64, "cfg_scale": 7.5,
        "sampler_index": "Euler a", "denoising_strength": 0.8, "resize_mode": 0,
        "init_images": [f"data:image/png;base64,{b64(RED)}"], "alwayson_scripts": {},
    }),
    "oobabooga": (TXT2IMG, {
        "prompt": PROMPT, "seed": -1, "sampler_name": "DPM++ 2M Karras", "enable_hr": True,
        "hr_scale": "1.5", "hr_upscaler": "None", "denoising_strength": "0.6", "steps": 2,
        "cfg_scale": "7", "width": 64.0, "height": "64", "restore_faces": False,
        "override_settings_restore_afterwards": True, "negative_prompt": "",
    }),
    "stabilitymatrix": (IMG2IMG, {
        "init_images": [b64(RED, "JPEG")], "prompt": PROMPT, "width": 64, "height": 64,
        "steps": 2, "denoising_strength": 0.75, "mask": None, "resize_mode": 1, "styles": [],
        "sampler_name": "UniPC", "seed": 5, "script_args": [], "tiling": None,
    }),
    "all null": (TXT2IMG, {
        **dict.fromkeys(("seed", "batch_size", "n_iter", "cfg_scale", "sampler_name", "styles",
                         "alwayson_scripts", "override_settings", "enable_hr")),
        **SMALL,
    }),
    "scripts switched off": (TXT2IMG, {
        **SMALL,
        "alwayson_scripts": {"ADetailer": {"args": [False]}, "ControlNet": {"args": []},
                             "x": {"args": [{"enabled": False}]}},
    }),
}  # fmt: skip


@pytest.mark.parametrize("program", PAYLOADS)
def test_what_programs_send_is_served(program: str, post: Post) -> None:
    """What each program's source sends gets images, seeds and infotexts, one for each."""
    path, payload = PAYLOADS[program]
    answer = post(path, payload)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    info = json.loads(told["info"])
    count = payload.get("batch_size") or 1
    assert len(told["images"]) == len(info["all_seeds"]) == len(info["infotexts"]) == count
    side = 96 if payload.get("enable_hr") else 64
    assert picture(told["images"][0]).size == (side, side)
    assert (info["width"], info["height"]) == (side, side)
    sampler = payload.get("sampler_name") or payload.get("sampler_index")
    if sampler == "DPM++ 2M":
        assert info["sampler_name"] == "DPM++ 2M Karras"


def test_a_lora_tag_is_of_its_request_alone(post: Post, engine: Engine, ink: Path) -> None:
    """``<lora:ink:0.8>`` is the request's own set; the engine's stays as it is."""
    tagged = post(TXT2IMG, {**SMALL, "prompt": f"{PROMPT} <lora:ink:0.8>"}).json()
    plain = post(TXT2IMG, SMALL).json()
    size = {"width": 64, "height": 64, "seed": 7, "steps": 2}
    own = engine.run(Txt2Img(prompt=PROMPT, lora=(Lora(ink, 0.8),), **size))
    assert picture(tagged["images"][0]).tobytes() == own.images[0].tobytes()
    assert tagged["images"] != plain["images"]
    assert engine.config.lora == ()


REFUSED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "script": (TXT2IMG, {"script_name": "X/Y/Z plot"}, 422, "Script 'X/Y/Z plot' not found"),
    "always on": (TXT2IMG, {"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, 422,
                  "always on script ADetailer not found"),
    "sampler": (TXT2IMG, {"sampler_name": "DPM fast"}, 404, "Sampler not found"),
    "upscaler": (TXT2IMG, {"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}, 422, "lanczos"),
    "no image": (IMG2IMG, {"init_images": None}, 404, "Init image not found"),
    "path": (IMG2IMG, {"init_images": ["/etc/hostname"]}, 422, "image"),
    "address": (IMG2IMG, {"init_images": ["http://127.0.0.1/x.png"]}, 422, "image"),
    "broken": (IMG2IMG, {"init_images": ["iVBORw0KGgo" * 9]}, 422, "image"),
    "model": (TXT2IMG, {"override_settings": {"sd_model_checkpoint": "dream"}}, 404, "not found"),
    "lora": (TXT2IMG, {"prompt": "<lora:nobody>"}, 422, "no nobody.safetensors"),
    "lora by path": (TXT2IMG, {"prompt": "<lora:../../etc/passwd>"}, 422, "stands in the prompt"),
    "second model": (TXT2IMG, {"enable_hr": True, "hr_checkpoint_name": "x"}, 422, "same model"),
    "batch": (TXT2IMG, {"batch_size": 65}, 422, "batch_size"),
    "guidance": (TXT2IMG, {"cfg_scale": 101}, 422, "cfg_scale"),
    "strength": (IMG2IMG, {"init_images": [b64(RED)], "denoising_strength": 0}, 422,
                 "denoising_strength"),
    "images": (IMG2IMG, {"init_images": [b64(RED)] * 2}, 422, "send one"),
    "fill": (IMG2IMG, {"init_images": [b64(RED)], "mask": b64(RED), "inpainting_fill": 4}, 422,
             "inpainting_fill"),
    "fit": (IMG2IMG, {"init_images": [b64(RED)], "resize_mode": 4}, 422, "resize_mode"),
    "mask": (IMG2IMG, {"init_images": [b64(RED)], "mask": "/etc/hostname"}, 422, "mask"),
    "speed": (TXT2IMG, {"speed": "light"}, 422, "speed"),
    "work": (TXT2IMG, {"width": 2048, "height": 2048, "steps": 1000}, 422, "ask for less"),
    "type": (TXT2IMG, {"steps": "many"}, 422, "steps"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_made_is_refused_in_words(case: str, post: Post, tiny_ir: Path) -> None:
    """The status is the one that clients know, and the words name no folder of the server."""
    path, payload, status, words = REFUSED[case]
    answer = post(path, {**SMALL, **payload})
    assert answer.status_code == status, answer.text
    assert words in answer.text
    paths = (str(tiny_ir.parent), "lora-dir", "/tmp")  # noqa: S108 - looked for, not used
    classes = (*errors.__all__, "Error", "Txt2Img", "Img2Img", "Hires ", "Traceback")
    for secret in (*paths, *classes):
        assert secret not in answer.text


@pytest.mark.parametrize("odd", ["x", -1, [], 1e300, {"": None}], ids=str)
def test_no_value_of_a_field_is_a_fault_of_the_server(odd: Any, address: str) -> None:
    """Whatever stands in a field, the answer is an image or words that blame the request."""
    forms = (
        (TXT2IMG, AskedTxt2Img, {**SMALL, "steps": 1}),
        (IMG2IMG, AskedImg2Img, {**SMALL, "steps": 1, "init_images": [b64(RED)]}),
    )
    with httpx.Client(base_url=address, timeout=PATIENCE) as client:
        for path, form, body in forms:
            for field in form.model_fields:
                answer = client.post(path, json={**body, field: odd})
                assert answer.status_code in {200, 404, 422}, (field, answer.text)


def test_progress_and_interrupt(address: str, post: Post, engine: Engine) -> None:
    """Progress shows steps and a preview; an interrupt is answered with what there is."""
    answers: list[httpx.Response] = []
    long = {**SMALL, "steps": 500, "enable_hr": True, "hr_second_pass_steps": 1}
    maker = threading.Thread(target=lambda: answers.append(post(TXT2IMG, long)))
    maker.start()
    told: dict[str, Any] = {}
    while not told.get("current_image"):
        assert not answers, answers[0].text
        told = httpx.get(f"{address}/sdapi/v1/progress", timeout=PATIENCE).json()
    assert 0 < told["progress"] < 1
    assert told["state"]["job_count"] == 1
    assert told["state"]["sampling_steps"] == 500
    assert picture(told["current_image"]).width > 1
    assert post("/sdapi/v1/interrupt", {}).json() == {}
    maker.join()
    assert answers[0].status_code == 200
    info = json.loads(answers[0].json()["info"])
    assert info["interrupted"]
    assert (info["seed"], info["all_seeds"], len(info["infotexts"])) == (7, [7], 1)
    assert engine.run(Txt2Img(**SMALL)).images
    idle = httpx.get(f"{address}/sdapi/v1/progress").json()
    assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)


def test_a_client_that_leaves_takes_its_job_along(address: str, studio: Studio) -> None:
    """Once the connection is closed, the engine stops within the step."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{address}{TXT2IMG}",
            json={**SMALL, "steps": 500, "batch_size": 8},
            timeout=httpx.Timeout(PATIENCE, read=1.0),
        )
    began = time.monotonic()
    while studio.jobs():
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.01)
    assert studio.engine.run(Txt2Img(**SMALL)).images
    while logged(studio.engine, "http.answered")[-1]["status"] != 499:
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.01)

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from holdfast.engine.logbook.redaction import Redaction

PROMPT = "portrait of Zebulon Quill, oil on canvas, masterpiece"


def learned(*prompts: str, lora: tuple[str, ...] = ()) -> Redaction:
    redaction = Redaction({"ada": "<user>"})
    for prompt in prompts:
        redaction.learn({"prompt": prompt, "lora": list(lora)})
    return redaction


@pytest.mark.parametrize(
    "path", ["/home/ada/a b/model.xml", r"C:\Users\Ada\m.bin", "~/models", r"\\nas\ada\x", "../ada"]
)
def test_path_becomes_a_mark_that_keeps_its_ending(path: str) -> None:
    """A path of any system becomes a mark, the same one each time, and other text stays."""
    hide: Any = Redaction({}).value
    assert hide(path) == hide(path)
    assert hide(path).startswith("<path ")
    assert hide(path).endswith((">", ".xml", ".bin"))
    assert hide("euler, 4 steps; 1/2 of https://example.org/a") == (
        "euler, 4 steps; 1/2 of https://example.org/a"
    )
    assert hide("runwayml/stable-diffusion") == "runwayml/stable-diffusion"


@pytest.mark.parametrize(
    "telling",
    [
        {"hf_token": "s3cret"},
        {"headers": {"Authorization": "s3cret"}},
        {"client_address": "s3cret"},
        {"error": "401 for https://ada:s3cret@example.org/model"},
        {"error": "sent Bearer s3cret and hf_s3cretS3CRETs3cret"},
        {"error": "not found: file:///home/s3cret/model.xml"},
    ],
    ids=lambda telling: next(iter(telling)),
)
def test_access_tokens_are_taken_out(telling: dict[str, Any]) -> None:
    """What opens a hub or a server to others is in no value, however it got there."""
    hidden = json.dumps(Redaction({}).value(telling))
    assert "s3cret" not in hidden
    assert "s3cret" in json.dumps(telling)


def test_words_that_only_look_like_secrets_stay() -> None:
    """Counts of tokens, and names that begin as a token does, are left alone."""
    event = {"tokens": 77, "component": "tokenizer", "shape": "hf_small"}
    assert Redaction({}).value(event) == event


PATHS = [
    "/home/zebulon quill/my models/x y.png",
    "/srv/zebulon/quill",
    "~zebulon/quill",
    "C:\\Users\\Zebulon Quill\\x y.xml",
    "models/zebulon/quill.safetensors",
    "models/zebulon quill/x.safetensors",
    "zebulon\\quill.bin",
    "../zebulon/quill",
    "file:///srv/zebulon/quill.xml",
    "\\\\nas\\zebulon\\quill",
]
PLACES = [
    "{}", "cannot read {}: no such file", "tried '{}' and \"{}\"", "PATH=/bin:{}:/usr/bin",
    "at host:{}", "see ({}), then {}",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("path", PATHS)
def test_path_is_taken_out_wherever_it_stands(path: str, place: str) -> None:
    """Paths with spaces, with backslashes and relative ones leave none of their words behind."""
    hidden = Redaction({}).value(place.replace("{}", path)).lower()
    assert "zebulon" not in hidden
    assert "quill" not in hidden


@pytest.mark.parametrize("begin", range(0, len(PROMPT) - 6, 5))
def test_cut_prompt_is_taken_out_too(begin: int) -> None:
    """Any part of a prompt that an error quotes, cut at any letter, is taken out."""
    hide = learned(PROMPT).text
    for end in range(begin + 12, len(PROMPT) + 1, 3):
        part = PROMPT[begin:end]
        assert hide(f"it would not see {part!r}. Shorten it") == (
            "it would not see '<prompt>'. Shorten it"
        )
    assert "ebulon" not in hide(f"PORTRAIT of zebulon quill {begin}")


def test_prompt_in_a_script_without_spaces_is_taken_out_too() -> None:
    """Some letters in a row of a prompt in Chinese or Japanese are recognised as words are."""
    assert learned("一只戴着帽子的红色大猫").text("看不到: 帽子的红色") == "看不到: <prompt>"


@pytest.mark.parametrize(
    "telling",
    [
        "GET https://example.org/a?token=s3cret&x=1#s3cret",
        "Authorization: Basic s3cret/s3cret==",
        "Cookie: a=s3cret; b=s3cret",
        "X-Api-Key: s3cret",
        '{"password": "s3cret"}',
        "PASSWORD=s3cret",
        "got ghp_s3cretS3CRETs3cret",
        "<Host user='s3cret' at 0x7f00>",
        "<bound method Host.see of <Host s3cret at 0x7f00>>",
        "data:image/png;base64,s3cret/s3cret",
    ],
)
def test_what_opens_something_is_taken_out_of_texts(telling: str) -> None:
    """Tokens in addresses and headers, pictures, and what a host's objects say of themselves go."""
    assert "s3cret" not in Redaction({}).text(telling)


def test_names_of_loras_become_marks() -> None:
    """A LoRA's name is the same mark wherever it stands, and its weight stays."""
    redaction = learned("cat", lora=("zebulons face@0.8", "ink@1"))
    event = {
        "event": "state.changed",
        "lora": ["zebulons face@0.8"],
        "reason": "lora: none -> zebulons face@0.8+ink@1",
    }
    hidden = redaction.value(event)
    (use,) = hidden["lora"]
    assert use.startswith("<lora ")
    assert use in hidden["reason"]
    assert not {"zebulons", "ink"} & set(hidden["reason"].replace("@", " ").split())


def test_what_the_host_added_is_left_out() -> None:
    """Keys that are no keys of the event, and the texts of a host's own errors, are not told."""
    hidden = Redaction({}).event(
        {
            "event": "subscriber.failed",
            "seq": 3,
            "user": "s3cret",
            "error": "ValueError('s3cret')",
            "subscriber": "<bound method Host.see of Host(user='s3cret')>",
        }
    )
    assert "s3cret" not in json.dumps(hidden)
    assert hidden == {
        "event": "subscriber.failed",
        "seq": 3,
        "error": "ValueError",
        "subscriber": "bound method Host.see",
    }


def test_words_of_the_log_stay_though_a_prompt_has_them() -> None:
    """A prompt of a word that the log uses too leaves the log readable by its tools."""
    event: dict[str, Any] = {"event": "component.read.started", "component": "unet", "seq": 1}
    assert learned("unet").event(event) == event


@pytest.mark.parametrize(
    "piece", ["+", "/", "a-", "'/", "a b ", "/a ", "<", "a://", "token", "w", "token=", "\\", ".",
              "~a", "a@", "authorization:", "'\"", "data:", ":", "./", "eyJ", "<secret>"],
)  # fmt: skip
def test_time_grows_with_the_length_alone(piece: str) -> None:
    """No text makes redaction take long: four times of it is done in about four times the time."""
    text = piece * (15_000 // len(piece))

    def seconds(times: int) -> float:
        began = time.thread_time()
        learned(PROMPT).text(text * times)
        return time.thread_time() - began

    # One that grew with the square would take sixteen times as long in every attempt; what else
    # the machine does can spoil some of them, and none is judged by how long it takes.
    assert any(seconds(4) < 8 * seconds(1) for _ in range(6))

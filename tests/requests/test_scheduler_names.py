"""Schedulers by every name that programs have for them."""

from __future__ import annotations

import pytest

from holdfast.engine import EngineConfig, Hires, InvalidRequest, Txt2Img
from holdfast.engine.requests.schedulers import SCHEDULERS

ELSEWHERE = {
    "Euler a": "euler-a",
    "k_euler": "euler",
    "k_euler_a": "euler-a",
    "k_euler_ancestral": "euler-a",
    "sample_euler_ancestral": "euler-a",
    "euler_ancestral": "euler-a",
    "EulerAncestralDiscrete": "euler-a",
    "k_heun": "heun",
    "k_lms": "lms",
    "PLMS": "pndm",
    "DPM++ 2M Karras": "dpm++2m-karras",
    "k_dpmpp_2m_ka": "dpm++2m-karras",
    "dpmpp_2m": "dpm++2m",
    "sample_dpmpp_2m": "dpm++2m",
    "dpmpp_2m_sde": "dpm++2m-sde",
    "dpmpp_2m_sde_karras": "dpm++2m-sde-karras",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "uni_pc": "unipc",
    "DDIM": "ddim",
    "LCM": "lcm",
    "TCDScheduler": "tcd",
}


@pytest.mark.parametrize("short", SCHEDULERS)
def test_what_infotext_calls_a_scheduler_is_read(short: str) -> None:
    """Each name of the table and each label is one scheduler, in any case and spacing."""
    label = SCHEDULERS[short].label
    for name in (short, short.upper(), short.replace("-", "_"), label, label.lower(), f" {label} "):
        assert Txt2Img(scheduler=name).scheduler == short
    assert Hires(hires_scheduler=label).hires_scheduler == short
    assert EngineConfig(scheduler=label).scheduler == short


@pytest.mark.parametrize("short", SCHEDULERS)
def test_a_class_of_diffusers_is_read(short: str) -> None:
    """A class name is the first scheduler of the table that it makes."""
    name = SCHEDULERS[short].class_name
    first = next(key for key, spec in SCHEDULERS.items() if spec.class_name == name)
    assert Txt2Img(scheduler=name).scheduler == first
    assert Txt2Img(scheduler=name.removesuffix("Scheduler")).scheduler == first


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_of_other_programs_are_read(name: str) -> None:
    """What k-diffusion, diffusers, ComfyUI and A1111 call a scheduler is that scheduler."""
    assert Txt2Img(scheduler=name).scheduler == ELSEWHERE[name]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("euler b", "did you mean euler"),
        ("dpm++2m-karas", r"did you mean dpm\+\+2m-karras"),
        ("unicp", "did you mean unipc"),
        ("", "choose one of euler, "),
        ("a poem", "choose one of euler, "),
        ("k", "choose one of euler, "),
    ],
)
def test_a_near_miss_is_told_what_was_meant(name: str, says: str) -> None:
    """An unknown name is refused with those there are, the nearest first."""
    with pytest.raises(InvalidRequest, match=says):
        Txt2Img(scheduler=name)

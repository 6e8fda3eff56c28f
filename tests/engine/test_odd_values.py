"""Whatever value a host hands to a public method, what comes out is an error of Holdfast's own."""

from __future__ import annotations

import contextlib
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.engine import Engine, EngineConfig, Hires, HoldfastError, Img2Img, Lora, Txt2Img
from holdfast.engine.requests.told import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Mute:
    """Cannot be shown, compared or hashed."""

    __hash__ = None  # type: ignore[assignment] # on purpose

    def __repr__(self) -> str:
        raise RuntimeError("no words")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no equal")

    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")


class Name(str):
    """A text of a class of its own."""

    __slots__ = ()


NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 10**400, 10**5000, -(10**5000), float("nan"), float("inf"), -0.0,
    1j, Decimal("NaN"), "", " ", "\0", "\ud800", "~nobody/x", "a" * 5000, Name("sketch"), b"",
    b"\xff", (), [], {}, set(), [[]], {"a": 1}, {None: None}, object, object(), Mute(), [Mute()],
    (Mute(),), {"k": Mute()}, print, Txt2Img, Exception("x"), np.zeros(2), np.float32("nan"),
    range(3), ..., NotImplemented,
)  # fmt: skip
ODD = st.one_of(
    st.text(max_size=8),
    st.binary(max_size=8),
    st.integers(),
    st.floats(),
    st.lists(st.none() | st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def any_value(test: Callable[..., None]) -> Callable[..., None]:
    """Call a test with some values as ``odd``; each time it tries those of `NASTY` too."""
    given_values: Callable[..., Callable[..., None]] = given(odd=ODD)
    return settings(max_examples=3)(given_values(test))


SETTINGS = sorted(EngineConfig.model_fields)


def values(kind: Any) -> dict[str, Callable[[Any], Any]]:
    """Return calls that make a `kind` with one odd field."""
    needs = {"image": np.zeros((8, 8, 3), np.uint8)} if kind is Img2Img else {}
    return {
        f"{kind.__name__}({name})": lambda odd, name=name: kind(**{**needs, name: odd})
        for name in sorted(kind.model_fields)
        if name != "kind"
    }


MADE = {
    **values(Txt2Img),
    **values(Img2Img),
    **values(Hires),
    "EngineConfig": lambda odd: EngineConfig(model=odd),
    "Lora": Lora,
    "Lora(weight)": lambda odd: Lora("x.safetensors", odd),
    "from_json": EngineConfig.from_json,
}
ASKED: dict[str, Callable[[Engine, Any], Any]] = {
    "subscribe": lambda engine, odd: engine.subscribe(odd)(),
    "subscribe, kinds": lambda engine, odd: engine.subscribe(print, odd)(),
    "subscribe, every": lambda engine, odd: engine.subscribe(print, preview_every=odd)(),
    "attach": lambda engine, odd: engine.attach(odd)(),
    "job": lambda engine, odd: engine.job(odd),
    "submit": lambda engine, odd: engine.submit(odd),
    "submit, priority": lambda engine, odd: cancelled(engine.submit(Txt2Img(), priority=odd)),
    "submit, deadline": lambda engine, odd: cancelled(engine.submit(Txt2Img(), deadline=odd)),
    "run": lambda engine, odd: engine.run(odd),
    "prepare": lambda engine, odd: engine.prepare(odd),
    "load": lambda engine, odd: engine.load(odd),
    "switch": lambda engine, odd: engine.switch(odd),
    "plan": lambda engine, odd: engine.plan(odd),
    **{
        f"plan({name})": lambda engine, odd, name=name: engine.plan(**{name: odd})
        for name in SETTINGS
    },
    **{
        f"configure({name})": lambda engine, odd, name=name: engine.configure(**{name: odd})
        for name in SETTINGS
    },
}


def cancelled(job: Any) -> None:
    job.cancel()


def try_all(call: Callable[[Any], Any], odd: Any) -> None:
    """Let through nothing but an error of Holdfast's own, which can be shown."""
    for value in (odd, *NASTY):
        try:
            call(value)
        except HoldfastError as error:
            assert str(error).strip()  # noqa: PT017 - that there may be none is the point
        except Exception as error:  # noqa: BLE001 - none may come out
            pytest.fail(f"{type(error).__name__} ({error}) of {shown(value)}")


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@any_value
def test_an_odd_field_is_refused_or_taken(make: Callable[[Any], Any], odd: Any) -> None:
    """A request, a setting and a LoRA of odd values is one, or an error of Holdfast's own."""
    try_all(make, odd)


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine whose model is not there: whatever it is asked, nothing is compiled."""
    with Engine(tmp_path_factory.mktemp("gone"), cache_dir=tmp_path_factory.mktemp("cache")) as it:
        yield it


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
@any_value
def test_an_odd_argument_is_refused_or_taken(
    waiting: Engine, ask: Callable[[Engine, Any], Any], odd: Any
) -> None:
    """Every method answers odd arguments in its own words, and the engine stays as it was."""
    try_all(lambda value: ask(waiting, value), odd)
    assert waiting.state == "unloaded"


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Files of odd names, such as of a log, are written into a folder of their own."""
    with contextlib.chdir(tmp_path_factory.mktemp("odd")):
        yield


@pytest.mark.parametrize("setting", SETTINGS)
@any_value
def test_an_engine_of_odd_settings_is_refused_or_opened(setting: str, odd: Any) -> None:
    """Opening is refused in words, or leaves an engine that closes."""

    def opened(value: Any) -> None:
        with Engine(**{"cache_dir": "cache", setting: value}) as engine:
            assert engine.state == "unloaded"

    try_all(opened, odd)


@any_value
def test_an_odd_patience_is_refused_or_kept(odd: Any) -> None:
    """`close` takes numbers of seconds; with anything else it says so, and can be called again."""

    def closed(value: Any) -> None:
        engine = Engine(cache_dir="cache")
        with pytest.raises(HoldfastError):
            engine.switch("img2img")  # so that there is a thread to wait for
        try:
            engine.close(timeout=value)
        finally:
            assert engine.close()

    try_all(closed, odd)

"""Errors and results go where hosts send them: into copies, pickles and other processes."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from holdfast.engine import Cancelled, CompileError, Hires, HoldfastError, IllegalTransition
from holdfast.engine.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from holdfast.engine import Engine

TEXT = st.text(max_size=20)
STATES = st.none() | TEXT
SPECIAL: dict[type[HoldfastError], st.SearchStrategy[HoldfastError]] = {
    IllegalTransition: st.builds(
        IllegalTransition, TEXT, TEXT, st.lists(TEXT, max_size=3).map(tuple)
    ),
    CompileError: st.builds(CompileError, TEXT, component=TEXT, key=TEXT, state_after=STATES),
    Cancelled: st.builds(
        Cancelled,
        TEXT,
        phase=TEXT,
        seconds_to_stop=st.floats(0, 10),
        first_pass=st.just([Image.new("RGB", (3, 2), (1, 2, 3))]),
        state_after=STATES,
    ),
}


def kinds(root: type[HoldfastError] = HoldfastError) -> Iterator[type[HoldfastError]]:
    yield root
    for kind in root.__subclasses__():
        if kind.__module__.startswith("holdfast."):
            yield from kinds(kind)


def errors() -> st.SearchStrategy[HoldfastError]:
    plain = (
        st.builds(kind, TEXT, state_after=STATES, log_text=STATES)
        for kind in set(kinds()) - SPECIAL.keys()
    )
    return st.one_of(*plain, *SPECIAL.values())


def facts(error: HoldfastError) -> dict[str, Any]:
    """Return all that an error says, with images as what they show."""
    held = vars(error) | {"class": type(error), "args": error.args, "text": str(error)}
    if "first_pass" in held:
        held["first_pass"] = [(one.size, one.tobytes()) for one in held["first_pass"]]
    return held


def raise_it(error: HoldfastError) -> None:
    raise error


def give_back(value: Any) -> Any:
    return value


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """A host's worker process, begun anew and not forked."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as opened:
        yield opened


@given(error=errors(), note=TEXT, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_every_error_is_copied_and_pickled_whole(
    error: HoldfastError, note: str, protocol: int
) -> None:
    """Class, text, attributes and notes of each error survive every way to copy it."""
    error.add_note(note)
    for twin in (
        copy.copy(error),
        copy.deepcopy(error),
        pickle.loads(pickle.dumps(error, protocol)),  # noqa: S301 - our own bytes
    ):
        assert facts(twin) == facts(error)


def test_every_error_comes_out_of_a_process_pool(pool: ProcessPoolExecutor) -> None:
    """A worker process that raises one gives it to the host whole, and serves on."""
    for error in (
        InvalidRequest("m", state_after="unloaded", log_text="l"),
        CompileError("m", component="unet", key="k", state_after="compiled-txt2img"),
        Cancelled("m", phase="step", seconds_to_stop=0.5, first_pass=[Image.new("L", (2, 2))]),
        IllegalTransition("recompile", "unloaded", ("load-txt2img",)),
    ):
        raised = pool.submit(raise_it, error).exception()
        assert isinstance(raised, HoldfastError)
        assert facts(raised) == facts(error)


def test_a_result_goes_through_a_process_pool(
    open_engine: Callable[..., Engine], pool: ProcessPoolExecutor
) -> None:
    """Images, request, infotexts and all else of a result are the same on the other side."""
    request = Hires(prompt="circle", width=64, height=64, steps=1, hires_steps=1, seed=3, batch=2)
    result = open_engine(precision="f32").run(request)
    for twin in (pool.submit(give_back, result).result(), copy.deepcopy(result)):
        for name, value in vars(result).items():
            if name in ("images", "first_pass"):
                pairs = zip(getattr(twin, name), value, strict=True)
                assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
            else:
                assert getattr(twin, name) == value

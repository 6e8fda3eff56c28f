"""What a failed pass is told as: its true cause, and advice that can help."""

from __future__ import annotations

import pytest

from holdfast.engine import GenerationError, InvalidRequest
from holdfast.engine.compiling.faults import generation_errors

OF_MEMORY = (
    MemoryError(),
    RuntimeError("std::bad_alloc"),
    RuntimeError("[CPU] Could not allocate: Can't allocate memory"),
    OSError("[Errno 12] Cannot allocate memory"),
    RuntimeError("[GPU] clWaitForEvents, error code: -5 CL_OUT_OF_RESOURCES"),
    RuntimeError("[GPU] Out of memory: 9 GiB were asked for"),
    RuntimeError("CL_MEM_OBJECT_ALLOCATION_FAILURE"),
)
OF_OTHER_THINGS = (
    RuntimeError("The size of tensor a (9) must match the size of tensor b (4)"),
    RuntimeError("Can't set the input tensor with index: 0"),
    AttributeError("'ModelOutput' object has no attribute 'latent_dist'"),
    OverflowError("int too big to convert"),
    ValueError("`final_sigmas_type` zero is not supported"),
    IndexError("index 1001 is out of bounds"),
)


def told(error: Exception) -> str:
    with pytest.raises(GenerationError) as caught, generation_errors("denoise"):
        raise error
    assert caught.value.__cause__ is error
    assert type(error).__name__ in str(caught.value)
    assert str(error) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("error", OF_MEMORY, ids=repr)
def test_a_smaller_size_is_advised_where_memory_ran_out(error: Exception) -> None:
    """However a library says that there was no memory, a smaller size is what helps."""
    assert "Try a smaller size." in told(error)


@pytest.mark.parametrize("error", OF_OTHER_THINGS, ids=repr)
def test_no_size_is_blamed_for_anything_else(error: Exception) -> None:
    """What has nothing to do with memory sends nobody to try sizes."""
    assert "size." not in told(error).removesuffix(str(error))
    assert "holdfast doctor" in told(error)


def test_an_error_of_our_own_goes_on_as_it_is() -> None:
    """What Holdfast raised itself is not told a second time."""
    error = InvalidRequest("no such size")
    with pytest.raises(InvalidRequest) as caught, generation_errors("denoise"):
        raise error
    assert caught.value is error

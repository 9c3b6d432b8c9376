"""Arrays in host memory: those that lie one behind the other become one without a copy."""

import gc

import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.weights import host


@pytest.mark.parametrize("shape", [(2, 8), (3, 512, 1024)], ids=["small", "mapped"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_parts_become_one_array_without_a_copy(shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    shape = (*shape[:-1], shape[-1] * 4)
    parts = host.empty_parts(4, shape, dtype)
    for number, part in enumerate(parts):
        part[...] = number
    arrays = [host.adopt(part) for part in parts]
    del parts, part
    whole, some = host.joined(arrays), host.joined(arrays[1:3])
    assert whole is not None
    assert some is not None
    assert whole.shape == (4, *shape)
    assert whole.unsafe_buffer_pointer() == arrays[0].unsafe_buffer_pointer()
    assert some.unsafe_buffer_pointer() == arrays[1].unsafe_buffer_pointer()
    # What was joined keeps the memory, whatever becomes of the parts.
    for array in arrays:
        array.delete()
    gc.collect()
    assert [np.unique(np.asarray(part)).tolist() for part in whole] == [[0], [1], [2], [3]]
    assert [np.unique(np.asarray(part)).tolist() for part in some] == [[1], [2]]


def test_arrays_that_are_not_neighbours_are_not_joined() -> None:
    parts = host.empty_parts(3, (16,), jnp.float32)
    for part in parts:
        part[...] = 0
    first, second, third = (host.adopt(part) for part in parts)
    assert host.joined([first, third]) is None
    assert host.joined([second, first]) is None
    assert host.joined([host.adopt(host.empty((16,), jnp.float32)), second]) is None
    # A row of 12 bytes would not be aligned: each is copied.
    odd = [host.adopt(part) for part in host.empty_parts(2, (3,), jnp.float32)]
    assert host.joined(odd) is None


def test_memory_is_freed_with_the_last_array_in_it() -> None:
    gc.collect()
    before = len(host._HOMES)
    arrays = [host.adopt(part) for part in host.empty_parts(2, (16,), jnp.float32)]
    whole = host.joined(arrays)
    assert len(host._HOMES) == before + 2
    del arrays
    gc.collect()
    assert len(host._HOMES) == before + 2
    del whole
    gc.collect()
    assert len(host._HOMES) == before


def test_memory_that_goes_on_behind_its_end_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = host.empty((2, 16), jnp.float32)
    whole[...] = 0
    # As if another memory began right behind the first row.
    monkeypatch.setattr(host, "_HOMES", {whole[0].ctypes.data: whole[0], whole[1].ctypes.data: whole[1]})
    assert host.joined([host.adopt(row) for row in whole]) is None

"""A Hopper made of threads: runs the Mosaic kernels' bodies on a CPU, one Python thread per warpgroup.

JAX's own interpreter cannot run these kernels: `inline_mgpu` and register operands on either version, `RefUnion`, `layout_cast`
and `async_store_smem` on 0.10.2. This stands in for `plgpu`, `pl` and `lax` inside the kernels' modules, and runs the very same
body with NumPy arrays behind the references. What it checks beside values:

- barriers are phases with counted arrivals, so a protocol that deadlocks on the device times out here;
- shared and output memory start as poison; an unwritten value that matters shows;
- a copy past the end is zero-filled or clipped as the copy engine does it; any other access past the end is an error.

What it cannot check: layouts, swizzles, missing waits for asynchronous products, memory ordering, speed.
"""

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from quikjax.pallas_kernels import hopper, layout
from quikjax.pallas_kernels.quik_matmul import feed, problem
from quikjax.pallas_kernels.quik_matmul import mosaic as matmul_kernel
from quikjax.pallas_kernels.quik_matmul import unsplit as unsplit_kernel
from quikjax.pallas_kernels.split_quantize import mosaic as split_kernel

TIMEOUT = 60.0
_here = threading.local()


class Ref:
    """A reference: a NumPy array and the box of it that this view covers (it may reach past the end, as a TMA box may)."""

    def __init__(self, array: np.ndarray, box: tuple[Any, ...] | None = None):
        self.array = array
        # One (start, length, kept) per axis of the array.
        self.box = box or tuple((0, n, True) for n in array.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(length for _, length, kept in self.box if kept)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @property
    def at(self) -> "_At":
        return _At(self)

    def view(self, index: Any) -> "Ref":
        index = index if isinstance(index, tuple) else (index,)
        box, position = [], 0
        for start, length, kept in self.box:
            if not kept or position >= len(index):
                box.append((start, length, kept))
                continue
            item = index[position]
            position += 1
            if item is Ellipsis:
                box.append((start, length, True))
                position = len(index)
            elif isinstance(item, pl.Slice):
                box.append((start + int(item.start), item.size, True))
            elif isinstance(item, slice):
                first, last, _ = item.indices(length)
                box.append((start + first, last - first, True))
            else:
                box.append((start + int(item), 1, False))
        return Ref(self.array, tuple(box))

    def transpose(self, order: tuple[int, ...]) -> "_Transposed":
        assert order == (1, 0)
        return _Transposed(self)

    def inside(self) -> tuple[slice, ...]:
        return tuple(
            slice(start, min(start + length, n)) for (start, length, _), n in zip(self.box, self.array.shape, strict=True)
        )

    def read(self, clipped: bool = False) -> np.ndarray:
        full = tuple(length for _, length, _ in self.box)
        part = self.array[self.inside()]
        if part.shape != full:
            assert clipped, f"read past the end: box {self.box} of {self.array.shape}"
            whole = np.zeros(full, self.array.dtype)
            whole[tuple(slice(0, n) for n in part.shape)] = part
            part = whole
        return part.reshape(self.shape)

    def write(self, value: Any, clipped: bool = False) -> None:
        full = tuple(length for _, length, _ in self.box)
        inside = self.inside()
        lengths = tuple(max(0, s.stop - s.start) for s in inside)
        assert clipped or lengths == full, f"write past the end: box {self.box} of {self.array.shape}"
        whole = np.broadcast_to(np.asarray(value), self.shape).reshape(full)
        self.array[inside] = whole[tuple(slice(0, n) for n in lengths)].astype(self.array.dtype)

    def __getitem__(self, index: Any) -> Any:
        return jnp.asarray(self.view(index).read())

    def __setitem__(self, index: Any, value: Any) -> None:
        self.view(index).write(value)


class _At:
    def __init__(self, ref: Any):
        self._ref = ref

    def __getitem__(self, index: Any) -> Any:
        return self._ref.view(index)


class _Transposed:
    def __init__(self, ref: Ref):
        self.ref = ref

    def read(self) -> np.ndarray:
        return self.ref.read().T

    def __setitem__(self, index: Any, value: Any) -> None:
        assert index is Ellipsis
        self.ref.write(np.asarray(value).T)


class _Union:
    """Several references over the same bytes, unpacked like a tuple: writing one spoils what the others read."""

    def __init__(self, shapes: tuple[Any, ...]):
        sizes = [_bits(s.dtype) * int(np.prod(s.shape)) for s in shapes]
        # The kernel relies on slot i of each ring covering the same bytes.
        assert len({size // shape.shape[0] for size, shape in zip(sizes, shapes, strict=True)}) == 1, sizes
        self.refs = [Ref(_poison(s.shape, s.dtype)) for s in shapes]

    def __iter__(self) -> Iterator[Ref]:
        return iter(self.refs)


class _Barriers:
    """Barriers with counted arrivals; each waiter walks the phases in order, as a parity does."""

    def __init__(self, arrivals: int, count: int):
        self.arrivals, self.pending, self.phase = arrivals, [arrivals] * count, [0] * count
        self.condition = threading.Condition()
        self.seen: dict[tuple[int, int], int] = {}

    @property
    def at(self) -> _At:
        return _At(self)

    def view(self, index: Any) -> Any:
        return _Barrier(self, int(index))


@dataclasses.dataclass
class _Barrier:
    of: _Barriers
    index: int

    def arrive(self) -> None:
        with self.of.condition:
            self.of.pending[self.index] -= 1
            if self.of.pending[self.index] == 0:
                self.of.pending[self.index] = self.of.arrivals
                self.of.phase[self.index] += 1
                self.of.condition.notify_all()

    def wait(self) -> None:
        key = (self.index, _here.warpgroup)
        wanted = self.of.seen.get(key, 0) + 1
        with self.of.condition:
            done = self.of.condition.wait_for(lambda: self.of.phase[self.index] >= wanted, TIMEOUT)
        assert done, f"deadlock: warpgroup {_here.warpgroup} waits for phase {wanted} of barrier {self.index}"
        # A parity tells only the last two phases apart.
        assert self.of.phase[self.index] <= wanted + 1, "a waiter fell two phases behind: the parity would be ambiguous"
        self.of.seen[key] = wanted


def _barrier(barrier: Any) -> _Barrier:
    return barrier if isinstance(barrier, _Barrier) else _Barrier(barrier, 0)


@dataclasses.dataclass
class _Accumulator:
    shape: tuple[int, int]
    dtype: Any
    value: Any = None

    @staticmethod
    def init(value: jax.Array) -> "_Accumulator":
        rows, columns = value.shape
        return _Accumulator((rows, columns), value.dtype, value)

    def __getitem__(self, index: Any) -> jax.Array:
        assert index is Ellipsis
        return self.value


def _bits(dtype: Any) -> int:
    dtype = jnp.dtype(dtype)
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).bits


def _poison(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    dtype = jnp.dtype(dtype)
    floating = jnp.issubdtype(dtype, jnp.floating)
    return np.full(shape, np.nan if floating else (5 if _bits(dtype) < 8 else 85), dtype)


def _kernel(
    body: Callable[..., None],
    *,
    out_type: Any,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    num_threads: int,
    thread_name: str,
    scratch_types: dict[str, Any],
    cluster: tuple[int, ...] = (),
    cluster_names: tuple[str, ...] = (),
    **_: Any,
) -> Callable[..., Any]:
    single = not isinstance(out_type, list | tuple)
    outputs = [out_type] if single else list(out_type)

    def run(*arrays: jax.Array) -> Any:
        results = [Ref(_poison(o.shape, o.dtype)) for o in outputs]
        refs = [Ref(np.asarray(array)) for array in arrays] + results
        sizes = {**dict(zip(grid_names, grid, strict=True)), **dict(zip(cluster_names, cluster, strict=True))}
        # Blocks of a cluster run together, clusters one after the other.
        for place in itertools.product(*(range(n) for n in grid)):
            blocks = list(itertools.product(*(range(n) for n in cluster)))
            scratch = {member: {name: _allocate(kind) for name, kind in scratch_types.items()} for member in blocks}
            failures: list[BaseException] = []

            def work(
                member: tuple[int, ...], group: int, place: Any = place, scratch: Any = scratch, failures: Any = failures
            ) -> None:
                _here.axes = {
                    **dict(zip(grid_names, place, strict=True)),
                    **dict(zip(cluster_names, member, strict=True)),
                    thread_name: group,
                }
                _here.sizes, _here.cluster, _here.scratch, _here.warpgroup = sizes, scratch, scratch[member], group
                try:
                    body(*refs, **scratch[member])
                except BaseException as failure:
                    failures.append(failure)

            threads = [threading.Thread(target=work, args=(b, g)) for b in blocks for g in range(num_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if failures:
                raise failures[0]
        values = [jnp.asarray(result.array) for result in results]
        return values[0] if single else values

    return run


def _allocate(kind: Any) -> Any:
    if isinstance(kind, plgpu.Barrier):
        return _Barriers(kind.num_arrivals, int(np.prod(kind.num_barriers)))
    if isinstance(kind, _UnionType):
        return _Union(kind.members)
    return Ref(_poison(kind.shape, kind.dtype))


@dataclasses.dataclass
class _UnionType:
    members: tuple[Any, ...]


def _matmul(accumulator: _Accumulator, a: Any, b: _Transposed) -> None:
    left = a.read() if isinstance(a, Ref) else np.asarray(a)
    right = b.read()
    assert left.dtype == right.dtype, (left.dtype, right.dtype)
    wide = np.int64 if accumulator.dtype == jnp.int32 else np.float32
    product = left.astype(wide) @ right.astype(wide)
    total = product if accumulator.value is None else np.asarray(accumulator.value).astype(wide) + product
    accumulator.value = jnp.asarray(total.astype(accumulator.dtype))


def _copy_in(source: Ref, target: Ref, barrier: Any) -> None:
    target.write(source.read(clipped=True).reshape(target.shape))
    _barrier(barrier).arrive()


def _store_remote(value: Any, ref: Ref, barrier: Any, *, cluster_idx: Any, cluster_dim: str, optimized: bool) -> None:
    del optimized, cluster_dim
    target, name = _here.cluster[(int(cluster_idx),)], _name_of(ref.array)
    Ref(target[name].array, ref.box).write(value)
    local = _barrier(barrier)
    owner = next(key for key, item in _here.scratch.items() if item is local.of)
    _Barrier(target[owner], local.index).arrive()


def _name_of(array: np.ndarray) -> str:
    return next(key for key, item in _here.scratch.items() if isinstance(item, Ref) and item.array is array)


def _nd_loop(grid: tuple[int, ...], *, collective_axes: str) -> Callable[[Callable[[Any], None]], None]:
    def decorate(body: Callable[[Any], None]) -> None:
        first, step = _here.axes[collective_axes], _here.sizes[collective_axes]
        for turn, index in enumerate(range(first, int(np.prod(grid)), step)):
            body(plgpu.NDLoopInfo(index=(jnp.int32(index),), local_index=turn, num_local_steps=None))

    return decorate


def _loop(first: Any, last: Any, *, init_carry: Any = None) -> Callable[[Callable[..., Any]], Any]:
    def decorate(body: Callable[..., Any]) -> Any:
        carry = init_carry
        for k in range(int(first), int(last)):
            carry = body(k) if init_carry is None else body(k, carry)
        return carry

    return decorate


def _when(condition: Any) -> Callable[[Callable[[], None]], None]:
    return lambda body: body() if bool(condition) else None


def _run_scoped(body: Callable[..., Any], *kinds: Any) -> Any:
    return body(*(dataclasses.replace(kind) for kind in kinds))


def _run_state(body: Callable[[Any], None]) -> Callable[[Any], Any]:
    def run(accumulator: _Accumulator) -> Any:
        body(accumulator)
        return accumulator.value

    return run


def _nothing(*_: Any, **__: Any) -> None:
    return None


class _Shim:
    """A module with some of its names replaced."""

    def __init__(self, module: Any, **replaced: Any):
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


_PLGPU = _Shim(
    plgpu,
    kernel=_kernel,
    ACC=_Accumulator,
    RefUnion=lambda *members: _UnionType(members),
    SMEM=lambda shape, dtype, transforms=(): jax.ShapeDtypeStruct(shape, dtype),
    nd_loop=_nd_loop,
    copy_gmem_to_smem=_copy_in,
    copy_smem_to_gmem=lambda source, target: target.write(source.read(), clipped=True),
    async_store_smem=_store_remote,
    barrier_wait=lambda barrier: _barrier(barrier).wait(),
    barrier_arrive=lambda barrier: _barrier(barrier).arrive(),
    wgmma=_matmul,
    layout_cast=lambda value, layout: value,
    broadcasted_iota=lambda dtype, shape, dimension, layout: lax.broadcasted_iota(dtype, shape, dimension),
    wgmma_wait=_nothing,
    commit_smem=_nothing,
    wait_smem_to_gmem=_nothing,
    set_max_registers=_nothing,
)
_PL = _Shim(pl, when=_when, loop=_loop, run_scoped=_run_scoped, run_state=_run_state)
_LAX = _Shim(lax, axis_index=lambda name: _here.axes[name], rem=lambda a, b: int(a) % int(b))


def _gather_row(row: Ref, positions: jax.Array, layout: Any, dtype: Any) -> jax.Array:
    del layout
    flat, where = row.read().reshape(-1), np.asarray(positions)
    assert where.min() >= 0, "gather before the row"
    assert where.max() < flat.size, "gather past the row"
    return jnp.asarray(flat[where].astype(dtype))


def _store_partials(slots: Ref, first: Any, values: jax.Array, layout: Any, operation: str) -> None:
    del layout
    reduce: Any = {"add": np.sum, "min": np.min, "max": np.max}[operation]
    for warp, part in enumerate(np.asarray(values, np.float32).reshape(hopper.WARPS, -1)):
        slots[int(first) + warp] = reduce(part)


def _load_transposed(ref: Ref, shape: tuple[int, int], first_row: Any, first_column: Any) -> jax.Array:
    rows, columns = (
        np.minimum(int(first) + np.arange(count), limit - 1)
        for first, count, limit in zip((first_row, first_column), reversed(shape), ref.shape, strict=True)
    )
    return jnp.asarray(ref.read()[np.ix_(rows, columns)].T)


def _store_transposed(ref: Ref, values: jax.Array, first_row: Any, first_column: Any) -> None:
    n, m = values.shape
    if int(first_row) < ref.shape[0] and int(first_column) < ref.shape[1]:
        ref.view((pl.ds(int(first_row), m), pl.ds(int(first_column), n))).write(np.asarray(values).T, clipped=True)


def _store_in_every_row(ref: Ref, values: jax.Array, layout: Any, start: Any, *, first: Any, apart: int, steps: int) -> None:
    del layout
    width = ref.shape[2]
    for column, value in enumerate(np.asarray(values), int(start)):
        step = column // width
        if step < steps and step % apart == int(first):
            ref.array[step // apart, :, column % width] = value


def _fed(words: jax.Array) -> jax.Array:
    """The codes of `[n, 16]` words in the order of their columns."""
    return layout.fed_codes(jnp.asarray(words)[None])


@contextlib.contextmanager
def running(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within this context the Mosaic kernels run on this machine, eagerly."""
    with patch.context() as p:
        for module in (split_kernel, matmul_kernel, problem, unsplit_kernel):
            for name, shim in (("plgpu", _PLGPU), ("pl", _PL), ("lax", _LAX)):
                p.setattr(module, name, shim, raising=False)
        p.setattr(hopper, "load", lambda ref, layout: jnp.asarray(ref.read()))
        p.setattr(hopper, "reciprocal", lambda x: np.float32(1) / x)
        p.setattr(hopper, "redefine", lambda values: values)
        p.setattr(hopper, "load_transposed", _load_transposed)
        p.setattr(hopper, "store_transposed", _store_transposed)
        p.setattr(hopper, "store_in_every_row", _store_in_every_row)
        p.setattr(hopper, "gather_row", _gather_row)
        p.setattr(feed, "widened", lambda words: (_fed(words).astype(jnp.int8) * feed.FACTOR).astype(jnp.int8))
        p.setattr(feed, "widened_16", lambda ref, dtype: _fed(ref.read()).astype(dtype))
        p.setattr(hopper, "store_warp_partials", _store_partials)
        yield

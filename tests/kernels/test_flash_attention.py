"""The attention kernels' bodies run on a CPU against the definition, and compiled for GPUs that are not there.

Tiny shapes that still meet every branch: texts of their own lengths, heads that share keys, tiles that end behind the last query
or key, keys split over programs some of which see none, heads that are no power of two, every kind of cache.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import absent_gpu
import attention_cases
import compile_attention
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from quikjax.models.attention import attend
from quikjax.models.base import Positions
from quikjax.models.cache import LayerCache, StackedCache
from quikjax.models.rope import Rope
from quikjax.pallas_kernels.devices import A100, CPU, H100, Device, tracing_for
from quikjax.pallas_kernels.flash_attention import choice, decode, prefill
from quikjax.pallas_kernels.flash_attention.choice import AttentionProblem, Tiles

LAYERS, KV_HEADS, HEAD, SCALE = 2, 2, 24, 0.3
# Products in 16 bits of weights that are rounded before they are normed, summed in another order.
CLOSE = {"float32": 3e-6, "bfloat16": 2**-6, "float16": 2**-9}


def _numbers(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _equal(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, expected)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context in which models choose as on an H100, and attention kernels run on this CPU, in tiles of 16; those called."""
    called: list[str] = []

    def watched(name: str, kernel: Any) -> Any:
        def run(*arguments: Any, **keywords: Any) -> Any:
            called.append(name)
            return kernel(*arguments, **keywords, interpret=True)

        return run

    for module, name in ((decode, "decode"), (prefill, "prefill")):
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))

    def small(problem: AttentionProblem, device: Device) -> Tiles:
        return Tiles(16, 16, 3 if problem.cached and not problem.alone and problem.length > 1 else 2 if problem.cached else 1)

    monkeypatch.setattr(choice, "tiles", small)

    @contextlib.contextmanager
    def tracing() -> Iterator[list[str]]:
        with tracing_for(H100):
            yield called

    return tracing


def _filled(kind: str, batch: int, slots: int, key_block: int = 0) -> StackedCache:
    """A cache of two blocks full of numbers, as if longer texts had been there before."""
    rng, shape = np.random.default_rng(8), (LAYERS, KV_HEADS, batch, slots, HEAD)
    if kind == "int8":
        codes = [jnp.asarray(rng.integers(-127, 128, shape), jnp.int8) for _ in range(2)]
        scales = [jnp.asarray(rng.uniform(0.005, 0.02, shape[:-1]), jnp.float32) for _ in range(2)]
        return StackedCache(keys=codes[0], values=codes[1], key_scale=scales[0], value_scale=scales[1], key_block=key_block)
    keys, values = (jnp.asarray(rng.normal(size=shape), kind) for _ in range(2))
    return StackedCache(keys=keys, values=values, key_block=key_block)


STARTS = jnp.array([0, 17, 33], jnp.int32)


def _step(cache: StackedCache, heads: int, length: int, dtype: Any, rope: Rope | None, slopes: Any) -> Any:
    """Further tokens behind texts of 0, 17 and 33 tokens, the last one of the middle text padding where there are several."""
    q, k, v = (_numbers(9 + i, 3, length, n, HEAD, dtype=dtype) for i, n in enumerate((heads, KV_HEADS, KV_HEADS)))
    at = STARTS[:, None] + jnp.arange(length, dtype=jnp.int32)
    at = at.at[1, -1].set(-1) if length > 1 else at
    where = Positions(at, write_at=STARTS)

    def run(cache: StackedCache, q: Any, k: Any, v: Any) -> Any:
        mixed, written = attend(q, k, v, where, LayerCache(cache, jnp.int32(1)), scale=SCALE, slopes=slopes, rope=rope)
        assert isinstance(written, LayerCache)
        return jnp.where(at[..., None, None] >= 0, mixed, 0), written.stacked

    return jax.jit(run)(cache, q, k, v)


@pytest.mark.parametrize(
    ("kind", "dtype", "group", "length", "rope", "alibi", "key_block"),
    [
        ("float32", "float32", 3, 1, Rope(), False, 0),
        pytest.param("float16", "float16", 2, 1, None, True, 0, marks=pytest.mark.long),
        pytest.param("float32", "bfloat16", 19, 1, None, False, 8, marks=pytest.mark.long),
        ("int8", "float32", 2, 1, Rope(), False, 0),
        ("bfloat16", "bfloat16", 3, 7, None, True, 8),
    ],
)
def test_further_tokens_and_the_cache_are_those_of_the_definition(
    on_a_gpu: Any, kind: str, dtype: str, group: int, length: int, rope: Rope | None, alibi: bool, key_block: int
) -> None:
    heads = group * KV_HEADS
    # Powers of two, so that their products with positions below 256 need no rounding.
    slopes = jnp.asarray(2.0 ** -np.arange(heads), jnp.float32) if alibi else None
    cache = _filled(kind, 3, 40, key_block)
    want, want_cache = _step(cache, heads, length, dtype, rope, slopes)
    with on_a_gpu() as called:
        got, got_cache = _step(cache, heads, length, dtype, rope, slopes)
    assert called == ["decode"]
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=CLOSE[dtype], rtol=CLOSE[dtype])
    # A sum of two products may or may not be one instruction.
    loose = {"atol": 1e-6} if kind == "float32" else {"atol": CLOSE["bfloat16"]} if kind != "int8" else {"atol": 1}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), **loose),
        got_cache,
        want_cache,
    )
    # Nothing but one slot of each text in one block has changed.
    changed = np.asarray(jnp.any(got_cache.keys != cache.keys, axis=-1))
    assert not changed[0].any()
    assert changed[1].any(axis=0).sum() <= 3 * length


@pytest.mark.long
def test_a_text_alone_gives_the_bits_it_gives_among_others(on_a_gpu: Any) -> None:
    """Longer texts beside it, a larger cache, and what earlier texts left behind its end, change no bit."""
    q, k, v = (_numbers(i, 3, 1, n, HEAD, dtype=jnp.bfloat16) for i, n in enumerate((4, KV_HEADS, KV_HEADS)))

    def run(cache: StackedCache, at: Any, q: Any, k: Any, v: Any) -> Any:
        where = Positions(at[:, None], write_at=at)
        return attend(q, k, v, where, LayerCache(cache, jnp.int32(0)), scale=SCALE, rope=Rope())[0]

    whole = _filled("bfloat16", 3, 64, 8)
    with on_a_gpu() as called:
        run = jax.jit(run)
        among = run(whole, STARTS, q, k, v)
        for row in range(3):
            part = slice(row, row + 1)

            def cut(x: Any, part: slice = part, row: int = row) -> Any:
                found = np.array(x[:, :, part, :40])
                found[:, :, :, int(STARTS[row]) :] = np.nan
                return jnp.asarray(found)

            _equal(run(jax.tree.map(cut, whole), STARTS[part], q[part], k[part], v[part]), among[part])
    assert called == ["decode", "decode"]


@pytest.mark.parametrize(
    ("dtype", "group", "length", "causal", "alibi"),
    [
        ("bfloat16", 3, 37, True, False),
        pytest.param("float16", 1, 20, True, True, marks=pytest.mark.long),
        ("bfloat16", 2, 20, False, False),
    ],
)
def test_prompts_are_read_as_by_the_definition(
    on_a_gpu: Any, dtype: str, group: int, length: int, causal: bool, alibi: bool
) -> None:
    """Padding on the left and on the right; backwards the definition's gradient."""
    heads = group * KV_HEADS
    tokens = [_numbers(i, 3, length, n, HEAD, dtype=dtype) for i, n in enumerate((heads, KV_HEADS, KV_HEADS))]
    places = np.tile(np.arange(length), (3, 1))
    places[1] -= 5
    places[2, length // 2 :] = -1
    real = jnp.asarray(places >= 0)[..., None, None]
    slopes = jnp.asarray(2.0 ** -np.arange(heads), jnp.float32) if alibi else None
    where = Positions(jnp.asarray(places, jnp.int32))
    towards = _numbers(5, 3, length, heads, HEAD)

    def loss(q: Any, k: Any, v: Any) -> Any:
        mixed, _ = attend(q, k, v, where, None, scale=SCALE, slopes=slopes, causal=causal)
        mixed = jnp.where(real, mixed, 0).astype(jnp.float32)
        return jnp.vdot(mixed, towards), mixed

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, want), want_gradients = jax.jit(run)(*tokens)
    with on_a_gpu() as called:
        (_, got), gradients = jax.jit(run)(*tokens)
    assert called == ["prefill"]
    np.testing.assert_allclose(got, want, atol=CLOSE[dtype], rtol=CLOSE[dtype])
    _equal(gradients, want_gradients)


@pytest.mark.long
def test_a_batch_under_vmap_is_the_definition(on_a_gpu: Any) -> None:
    tokens = [_numbers(i, 2, 1, 9, n, HEAD, dtype=jnp.bfloat16) for i, n in enumerate((4, 2, 2))]
    where = Positions(jnp.arange(9, dtype=jnp.int32)[None])

    def run(q: Any, k: Any, v: Any) -> Any:
        return attend(q, k, v, where, None, scale=SCALE)[0]

    want = jax.jit(jax.vmap(run))(*tokens)
    with on_a_gpu():
        found = jax.jit(jax.vmap(run))(*tokens)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(want, np.float32))


def test_attention_with_kernels_is_exported_for_a_gpu_that_is_not_here() -> None:
    """A step and a prompt; for both platforms at once, the definition."""
    cache = _filled("bfloat16", 1, 32)
    q = _numbers(0, 1, 1, 2, HEAD, dtype=jnp.bfloat16)

    def both(cache: StackedCache, q: jax.Array, at: jax.Array) -> Any:
        step = attend(q, q, q, Positions(at[:, None], write_at=at), LayerCache(cache, jnp.int32(0)), scale=SCALE)[0]
        return attend(step, q, q, Positions(at[:, None]), None, scale=SCALE)[0]

    arguments = (cache, q, jnp.array([3], jnp.int32))
    leaves, tree = jax.tree.flatten(arguments)
    program = jax.jit(lambda *leaves: both(*jax.tree.unflatten(tree, leaves)))
    kernel = "__gpu$xla.gpu.triton"
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice(H100.kind, H100.cores, "gpu"))
    with tracing_for(H100), jax.sharding.use_abstract_mesh(mesh):
        allowed = [export.DisabledSafetyCheck.custom_call(kernel)]
        exported = export.export(program, platforms=["cuda"], disabled_checks=allowed)(*leaves)
    assert exported.mlir_module().count(f"@{kernel}(") == 2
    assert kernel not in export.export(program, platforms=["cpu", "cuda"])(*leaves).mlir_module()


def _problem(**changed: Any) -> AttentionProblem:
    usual = {"batch": 1, "length": 1, "heads": 32, "kv_heads": 32, "head": 128, "slots": 2048, "cached": True}
    return AttentionProblem(**{**usual, "dtype": jnp.bfloat16, "kind": jnp.bfloat16, **changed})


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (_problem(), CPU, "compute capability 8.0 or later, this is cpu"),
        (_problem(), Device("gpu", "Tesla T4", (7, 5), 40), "this is Tesla T4"),
        (_problem(), Device("gpu"), "this is gpu"),
        (_problem(head=512), H100, "heads of 512 numbers"),
        (_problem(dtype=jnp.float64), H100, "queries are float64"),
        (_problem(cached=False, dtype=jnp.float32, kind=jnp.float32), A100, "float32 prompts are multiplied faster by XLA"),
        (_problem(batch=0), A100, "nothing to attend to"),
    ],
)
def test_what_no_kernel_takes_has_a_reason(problem: AttentionProblem, device: Device, reason: str) -> None:
    assert reason in str(choice.why_not(problem, device))


def test_tiles_depend_on_neighbours_only_where_they_may() -> None:
    assert choice.why_not(_problem(), H100) is None
    assert choice.tiles(_problem(), H100).splits == 4  # 32 programs on 132 multiprocessors
    assert choice.tiles(_problem(batch=64), H100).splits == 1
    assert choice.tiles(_problem(slots=256), H100).splits == 1
    alone = [_problem(alone=True, **more) for more in ({}, {"batch": 64}, {"slots": 128}, {"slots": 8192})]
    assert len({choice.tiles(problem, H100) for problem in alone}) == 1
    several = [_problem(alone=True, length=n) for n in (2, 16, 40, 128)]
    assert len({choice.tiles(problem, H100) for problem in several}) == 1


compiles = pytest.mark.skipif(absent_gpu.missing() is not None, reason=str(absent_gpu.missing()))


@compiles
@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("LLaMA-2-7B, one row", "h100"),
        # Compiled by `make gpu-compile`, and so in each run of CI, as all others are.
        pytest.param("LLaMA-2-7B, int8 cache", "a100", marks=pytest.mark.slow),
        pytest.param("LLaMA-2-70B, prompt", "h100", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_without_spills_onto_the_tensor_cores(name: str, gpu: str) -> None:
    (case,) = (case for case in attention_cases.CASES if case.name == name)
    assert compile_attention.problems(case, gpu) == []

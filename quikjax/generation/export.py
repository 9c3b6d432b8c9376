"""Generation as programs that run without quikjax: `jax.export` of prompt reading and of decoding, parameters as arguments.

Everything that crosses a program's border is an array in dictionaries with string keys. Packed weights and caches are taken
apart before and rebuilt inside, while the program is traced.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from quikjax.errors import QuikError, did_you_mean
from quikjax.generation import decode
from quikjax.generation.decode import CHUNK, NOTHING, Kind, Past, State
from quikjax.generation.generator import KEY_BLOCK
from quikjax.generation.sampling import row_keys
from quikjax.generation.settings import Sampling
from quikjax.models import cache as caches
from quikjax.models import stacked
from quikjax.models.base import Transformer
from quikjax.models.cache import StackedCache
from quikjax.models.dtypes import check_cache_kind
from quikjax.models.memory import device_memory
from quikjax.models.stacked import Layout
from quikjax.models.tokens import checked_model
from quikjax.pallas_kernels.devices import CPU, Device, current_device, tracing_for

# A GPU of no known kind: layers traced for it are plain XLA, which runs on any.
PLATFORMS = {"cpu": CPU, "cuda": Device("gpu")}
NOT_EXPORTED = {
    "Hopper and Ampere kernels": "their code is for one kind of GPU and JAX promises no stability for such calls; "
    "cuda programs are plain XLA",
    "tpu": "no layer of quikjax is checked on a TPU",
    "rocm": "no layer of quikjax is checked on an AMD GPU",
}
_CACHE_FIELDS = ("keys", "values", "key_scale", "value_scale")

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportedPrograms:
    """Programs and parameters with which a process without quikjax generates greedily.

    `programs[platform]` holds the serialized "prefill" and "decode". `params` are their first argument: arrays by name. `batch`
    rows are read at once, each padded on the right to `length` tokens; `context` is how many tokens a prompt and its continuation
    may have; `slots` what the cache has room for. `stops` int32 `[stops]` is the model's own, padded with -1.
    """

    programs: Mapping[str, Mapping[str, bytes]]
    params: Arrays
    batch: int
    length: int
    context: int
    slots: int
    cache: str
    stops: np.ndarray
    chunk: int = CHUNK


def check_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    """The platforms, each once.

    Raises:
        QuikError: one of them cannot be exported for, with the reason; there is none; or `flatbuffers` is not installed.
    """
    for name in platforms:
        if name in NOT_EXPORTED:
            raise QuikError(f"programs cannot be exported for {name}: {NOT_EXPORTED[name]}; choose {' or '.join(PLATFORMS)}")
        if name not in PLATFORMS:
            raise QuikError(f'there is no platform "{name}" to export for; {did_you_mean(name, PLATFORMS)}')
    if not platforms:
        raise QuikError(f"no platform is named to export for; choose {' or '.join(PLATFORMS)}")
    try:
        importlib.import_module("flatbuffers")
    except ImportError:
        raise QuikError("jax.export writes programs with flatbuffers, which is missing; pip install 'quikjax[export]'") from None
    return tuple(dict.fromkeys(platforms))


def export_programs(
    model: Transformer,
    *,
    length: int,
    context: int,
    batch: int = 1,
    cache: str | None = None,
    platforms: Sequence[str] = ("cpu",),
    release: bool = False,
) -> ExportedPrograms:
    """Greedy generation with `model`, exported: prompts of up to `length` tokens, with their continuation up to `context`.

    Args:
        model: one of ours, dense or with packed weights.
        length: tokens that a prompt is padded to.
        context: tokens of a prompt and its continuation at most; the cache is made for so many.
        batch: rows generated together.
        cache: kind of the KV cache; left out, the dtype of the activations.
        platforms: of `PLATFORMS`. For "cpu" alone dense matrices of 16 bits are held in float32, as generation here holds them.
        release: free the model's own block parameters as they are stacked.

    The programs, under `jit` or not, compute the tokens of `Generator.generate` (of logits that agree to the last bits, not
    always in them: buckets of lengths are others):

        prefill(params, ids int32 [batch, length], lengths int32 [batch], running bool [batch], stops int32 [stops])
            -> tokens int32 [batch, 1], state
        decode(params, state, stops, limit int32 []) -> tokens int32 [batch, chunk], state

    `state` is a dictionary; its "running" tells which rows have not stopped. Behind a row's stop token every token is -1.

    Raises:
        QuikError: the model is an encoder; a platform cannot be exported for; lengths that the model does not have; no such
            cache; it does not fit.
    """
    platforms, model = check_platforms(platforms), checked_model(model)
    config = model.config
    if not 1 < context <= config.context_length:
        raise QuikError(f"the context may be 2 to {config.context_length} tokens, which is the model's own, not {context}")
    if not 1 <= length < context:
        raise QuikError(f"prompts may be padded to 1 to {context - 1} tokens, so that the context of {context} has one more")
    if batch < 1:
        raise QuikError(f"at least 1 row is generated at a time, not {batch}")
    if cache is not None:
        check_cache_kind(cache)
    # Weights stay in the form of files, not in the tiles that one GPU's kernels read.
    # Blocks are stacked for every platform: a program without kernels copies nothing for them, and does not grow with the depth.
    with tracing_for(PLATFORMS[platforms[0]]):
        layout, tree = stacked.stack(model, release=release, widen=platforms == ("cpu",), unrolled=False)
    kind = cache or layout.dtype
    slots = max(-(-context // KEY_BLOCK), 2) * KEY_BLOCK
    need, memory = caches.cache_bytes(config.layers, config.kv_heads, batch, slots, config.head_size, kind), device_memory()
    if need > memory:
        raise QuikError(
            f"a {kind} KV cache for {batch} row{'s' if batch > 1 else ''} of {slots} tokens takes {need / 1e9:.3g} GB of this "
            f"machine's {memory / 1e9:.3g} GB; give a smaller --context or --batch, or --kv-cache int8"
        )
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    params = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(params) == len(leaves), "two parameters have one name"
    stops = np.full(max(len(model.stops), 1), NOTHING, np.int32)
    stops[: len(model.stops)] = sorted(model.stops)
    programs = {}
    for platform in platforms:
        # A GPU's attention takes all slots at once.
        shape = _Shape(layout, structure, tuple(params), slots, kind, KEY_BLOCK if platform == "cpu" else 0)
        programs[platform] = _programs(shape, params, batch, length, len(stops), platform)
    return ExportedPrograms(
        programs=programs,
        params=params,
        batch=batch,
        length=length,
        context=context,
        slots=slots,
        cache=kind,
        stops=stops,
    )


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The static part of the exported programs."""

    layout: Layout
    structure: Any
    names: tuple[str, ...]
    slots: int
    kind: str
    key_block: int

    def rebuilt(self, params: Arrays) -> Any:
        """The stacked parameter tree, packed weights and all, from arrays by name."""
        return jax.tree.unflatten(self.structure, [params[name] for name in self.names])

    def prefill(
        self,
        params: Arrays,
        ids: Int32[Array, "batch length"],
        lengths: Int32[Array, " batch"],
        running: Bool[Array, " batch"],
        stops: Int32[Array, " stops"],
    ) -> tuple[Int32[Array, "batch 1"], Arrays]:
        """The first token of each row, and the state that `decode` goes on with."""
        config, batch = self.layout.config, ids.shape[0]
        logits, fresh = stacked.read(self.layout, self.rebuilt(params), ids, lengths, self.kind)
        empty = caches.empty_cache(config.layers, config.kv_heads, batch, self.slots, config.head_size, self.kind, self.key_block)
        cache = caches.insert(empty, fresh, jnp.int32(0))
        values = Sampling().values()
        tokens, _, state = decode.begin(logits, cache, lengths, running, _keys(batch), Past(), stops, values, None, Kind())
        return tokens, _apart(state)

    def decode(
        self, params: Arrays, state: Arrays, stops: Int32[Array, " stops"], limit: Int32[Array, ""]
    ) -> tuple[Int32[Array, "batch chunk"], Arrays]:
        """Up to `limit` further tokens of each row, and the state behind them."""
        given = State(
            cache=StackedCache(**{name: state.get(name) for name in _CACHE_FIELDS}, key_block=self.key_block),
            last=state["last"],
            at=state["at"],
            running=state["running"],
            step=state["step"],
            keys=_keys(state["last"].shape[0]),
        )
        values = Sampling().values()
        tokens, _, after = decode.chunk(self.layout, self.rebuilt(params), given, stops, values, limit, Kind())
        return tokens, _apart(after)


def _keys(batch: int) -> Array:
    """PRNG keys that greedy decoding carries and does not read."""
    return row_keys(jnp.zeros(batch, jnp.uint32), jnp.zeros(batch, jnp.int32))


def _apart(state: State) -> Arrays:
    fields = {name: getattr(state.cache, name) for name in _CACHE_FIELDS}
    arrays = {**fields, "last": state.last, "at": state.at, "running": state.running, "step": state.step}
    return {name: array for name, array in arrays.items() if array is not None}


def _programs(shape: _Shape, params: Arrays, batch: int, length: int, stops: int, platform: str) -> dict[str, bytes]:
    """Both programs for one platform, serialized."""
    of = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in params.items()}
    rows, ends = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((stops,), jnp.int32)
    ids, running = jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.bool_)
    here = current_device()
    with tracing_for(here if here.platform == platform else PLATFORMS[platform]):
        read = jax.export.export(jax.jit(shape.prefill), platforms=[platform])(of, ids, rows, running, ends)
        state = jax.tree.unflatten(read.out_tree, read.out_avals)[1]
        state = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in state.items()}
        limit = jax.ShapeDtypeStruct((), jnp.int32)
        # The cache is written where it lies.
        step = jax.export.export(jax.jit(shape.decode, donate_argnums=1), platforms=[platform])(of, state, ends, limit)
    return {"prefill": bytes(read.serialize()), "decode": bytes(step.serialize())}

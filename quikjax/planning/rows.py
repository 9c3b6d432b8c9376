"""Parameters of a model under a recipe, as rows of equal ones: what each becomes, its bytes, which backend multiplies by it."""

import dataclasses
import math
from collections import Counter
from typing import Any

import jax.numpy as jnp

from quikjax.errors import QuikError
from quikjax.models.base import Transformer
from quikjax.models.registry import dotted, pure_params
from quikjax.pallas_kernels.choice import BackendError, Choice, Problem, choose
from quikjax.pallas_kernels.devices import Device
from quikjax.pallas_kernels.reference import MAX_BASE
from quikjax.planning.switches import ProductTimes, product_times
from quikjax.quantizing import memory
from quikjax.quantizing.codebook_rule import CodebookRule
from quikjax.quantizing.group_rule import GroupRule
from quikjax.quantizing.params import abstract_weight
from quikjax.quantizing.proxies import has_proxies
from quikjax.quantizing.recipe import AnyRule, Recipe, Rule
from quikjax.quantizing.shared_inputs import input_axes
from quikjax.weights.codebook import CodebookWeight
from quikjax.weights.linear import explain


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Layers of one kind: equal but for the number of their block, which is `*` in `pattern`.

    `bytes` are those of one layer as stored, everything counted. `prefill` is the backend that reads `batch * length` tokens at
    once, `decode` the one that reads `batch` (of a layer that runs for each token generated); `None` if none can, and then
    `problems` says why.
    """

    pattern: str
    format: str
    count: int
    outputs: int
    inputs: int
    method: str
    weight_bits: int
    activation_bits: int
    level_clip: tuple[int, int] | str | None
    outliers: int
    bytes: int
    prefill: Choice | None
    decode: Choice | None

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensePlan:
    """Parameters of one kind that are not quantized. `bytes` are those of one."""

    pattern: str
    count: int
    shape: tuple[int, ...]
    bytes: int
    in_block: bool


class Rows:
    """Every parameter of a model under a recipe, as rows of equal ones, and what is wrong with them."""

    def __init__(self, model: Transformer, recipe: Recipe, dtype: Any, device: Device, batch: int, length: int) -> None:
        self.model, self.dtype, self.device, self.batch, self.length = model, dtype, device, batch, length
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._blocks = {".".join((*model.block_path, key)): block for key, block in model.blocks.items()}
        linear = {
            f"{name}.{layer}.weight": block.decodes(group)
            for name, block in self._blocks.items()
            for group, layers in block.groups.items()
            for layer in layers
        }
        self._idle: set[str] = set()  # patterns of layers that take no part in decoding
        self._params = dotted(pure_params(model))
        # A rule may name a block by its number, so every path is asked; equal answers become one row.
        kinds: Counter[tuple[str, tuple[int, ...], AnyRule | None, int]] = Counter()
        self._rules: dict[str, AnyRule] = {}
        self._outliers: dict[str, int] = {}
        within: set[str] = set()
        for path, leaf in self._params.items():
            pattern, inside = self._pattern(path)
            if inside:
                within.add(pattern)
            rule = recipe.rule_for(path) if inside else None
            # With data, only layers whose input is observed are quantized; without, whatever a rule names inside a block.
            if rule is not None and recipe.needs_data() and path not in linear:
                rule = None
            if not linear.get(path, True):
                self._idle.add(pattern)
            if rule is not None:
                self._rules[path] = rule
                self._outliers[path] = self._outlier_count(rule, path, leaf.shape)
            kinds[pattern, tuple(leaf.shape), rule, self._outliers.get(path, 0)] += 1
        self.layers: list[LayerPlan] = []
        self.dense: list[DensePlan] = []
        for (pattern, shape, rule, outliers), count in kinds.items():
            if rule is None:
                size = dtype.itemsize
                for extent in shape:
                    size *= extent
                in_block = pattern in within
                self.dense.append(DensePlan(pattern=pattern, count=count, shape=shape, bytes=size, in_block=in_block))
            else:
                self._layer(pattern, shape, rule, outliers, count)

    def _pattern(self, path: str) -> tuple[str, str | None]:
        """The path with `*` for the block's number, and what is left within the block (`None` outside blocks)."""
        name = self.model.block_of(path)
        if name is None:
            return path, None
        inside = path.removeprefix(name + ".")
        return f"{name.rpartition('.')[0]}.*.{inside}", inside

    def _outlier_count(self, rule: AnyRule, path: str, shape: tuple[int, ...]) -> int:
        if isinstance(rule, CodebookRule):
            name = self.model.block_of(path)
            assert name is not None
            layer = path.removeprefix(name + ".").removesuffix(".weight")
            group = next((group for group, layers in self._blocks[name].groups.items() if layer in layers), None)
            if not rule.proxy or group is None or not has_proxies(self.model, group, name == next(iter(self._blocks))):
                return 0
        return rule.outlier_count(shape[-1], self.model.config.hidden_size)

    def _layer(self, pattern: str, shape: tuple[int, ...], rule: AnyRule, outliers: int, count: int) -> None:
        try:
            axes = input_axes(pattern, rule, len(shape))
        except QuikError as error:
            self.problems.append(str(error))
            return
        if axes != (1,):
            self.problems.append(f"in_axes {axes} of {pattern}: the inputs of a published weight are its axis 1")
            return
        n, k = shape
        exact = rule.activation_bits < 16
        if outliers >= k:
            self.problems.append(f"{pattern} has {k} input columns, all of which would be outliers; use fewer than {k}")
        elif exact and k - outliers > MAX_BASE:
            self.problems.append(
                f"{pattern} has {k - outliers} base columns; int32 accumulators are exact up to {MAX_BASE}, "
                f"so at least {k - MAX_BASE} must be outliers"
            )
        base = k - outliers
        legal = base > 0 and (base <= MAX_BASE or not exact)
        decodes = legal and self.model.generates and pattern not in self._idle
        made = abstract_weight(rule, shape, base)
        if isinstance(made, CodebookWeight) and made.last_block < made.block:
            self.notes.append(f"blocks of {made.block} do not divide {pattern}: its last block has {made.last_block} weights")
        self.layers.append(
            LayerPlan(
                pattern=pattern,
                format=made.label,
                count=count,
                outputs=n,
                inputs=k,
                method=rule.method,
                weight_bits=rule.weight_bits,
                activation_bits=rule.activation_bits,
                level_clip=None if isinstance(rule, CodebookRule) else rule.level_clip,
                outliers=outliers,
                bytes=made.bits() // 8,
                prefill=self._choose(pattern, shape, rule, base, self.batch * self.length) if legal else None,
                decode=self._choose(pattern, shape, rule, base, self.batch) if decodes else None,
            )
        )

    def _choose(self, pattern: str, shape: tuple[int, ...], rule: AnyRule, base: int, rows: int) -> Choice | None:
        if not isinstance(rule, Rule):
            return explain(abstract_weight(rule, shape, base), rows, self.dtype, device=self.device)
        problem = Problem(
            rows=rows,
            inputs=shape[1],
            outputs=shape[0],
            base=base,
            weight_dtype=jnp.dtype(jnp.int4 if rule.weight_bits == 4 else jnp.int8),
            bits=rule.activation_bits,
            dtype=self.dtype,
            outlier_dtype=jnp.dtype(rule.outlier_dtype),
        )
        try:
            return choose(problem, self.device)
        except BackendError as error:
            self.problems.append(f"{pattern}: {error}")
            return None

    def products(self) -> tuple[ProductTimes, ...]:
        """Times of an encoder's products, by count."""
        shapes = {path: tuple(leaf.shape) for path, leaf in self._params.items()}
        return product_times(self.model, self._rules, self._outliers, shapes, self.device, self.batch * self.length)

    def footprint(self) -> memory.Footprint:
        """Collect what peak memory depends on; of blocks that differ, the largest."""
        groups: dict[tuple[type, str], memory.Group] = {}
        quantized: dict[type, dict[str, memory.Group]] = {}
        shapes = {path: tuple(leaf.shape) for path, leaf in self._params.items()}
        size, packed_weights, packed_bytes, running_bytes = Counter[str](), Counter[str](), Counter[str](), 0
        rest = 0
        for path, leaf in self._params.items():
            name = self.model.block_of(path)
            if name is None:
                rest += leaf.size * self.dtype.itemsize
                continue
            size[name] += leaf.size
            rule = self._rules.get(path)
            if rule is None or len(leaf.shape) != 2:
                running_bytes += leaf.size * self.dtype.itemsize
                continue
            stored = self._held(shapes[path], rule, self._outliers[path])
            packed_weights[name] += leaf.size
            packed_bytes[name] += stored
            running_bytes += stored
        for name, block in self._blocks.items():
            for group, layers in block.groups.items():
                paths = [f"{name}.{layer}.weight" for layer in layers]
                found = memory.Group(shapes[paths[0]][1], tuple(shapes[path][0] for path in paths))
                groups[type(block), group] = found
                if any(path in self._rules for path in paths):
                    quantized.setdefault(type(block), {})[group] = found
        # Of two kinds of block, that whose layers read more.
        most = max(quantized.values(), key=lambda of: sum(group.inputs for group in of.values()), default={})
        return memory.Footprint(
            config=self.model.config,
            itemsize=self.dtype.itemsize,
            groups=tuple(groups.values()),
            quantized=tuple(most.values()),
            block_parameters=max(size.values()),
            block_quantized=max(packed_weights.values(), default=0),
            block_packed=max(packed_bytes.values(), default=0),
            block_bytes=running_bytes,
            rest_bytes=rest,
            dequantized=max(
                (
                    sum(
                        self.dtype.itemsize * math.prod(shapes[path])
                        for path in (f"{name}.{layer}.weight" for layer in layers)
                        if isinstance(self._rules.get(path), CodebookRule | GroupRule)
                    )
                    for name, block in self._blocks.items()
                    for layers in block.groups.values()
                ),
                default=0,
            ),
        )

    def _held(self, shape: tuple[int, ...], rule: AnyRule, outliers: int) -> int:
        """Bytes of a packed weight in the device's memory: as stored, sparse codes expanded; on a CPU a code has a byte."""
        base = shape[1] - outliers
        if isinstance(rule, Rule) and rule.sparsity is not None:
            rule = rule.model_copy(update={"sparsity": None})
        unpacked = isinstance(rule, Rule) and self.device.platform == "cpu"
        wider = shape[0] * base * (8 - rule.weight_bits) // 8 if unpacked else 0
        return abstract_weight(rule, shape, base).bits() // 8 + wider

"""Outlier columns without data: where a layer's units have large weights, what they write is large (arXiv 2212.09720, section 3).

The standard deviation of a unit's incoming weights in the layer that *produces* a tensor scores the column of the layers that
read it. Which layer that is follows from the family; a column holds what several layers wrote where they are added up (a
residual, fused projections), and then their variances are added.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from quikjax.models.base import Block, Transformer
from quikjax.models.bert import BertBlock
from quikjax.models.distilbert import DistilBertBlock
from quikjax.models.encoder import EncoderConfig
from quikjax.models.falcon import FalconBlock, FalconConfig
from quikjax.models.gpt2 import GPT2Block, GPT2Config
from quikjax.models.llama import LlamaBlock
from quikjax.models.opt import OPTBlock, OPTConfig
from quikjax.weights.quik import as_matrix

Scores = Float32[Array, " k"]


@dataclasses.dataclass(frozen=True)
class Producers:
    """The producer of the tensor that a group of layers reads.

    `layers` of the same block, or with `previous` of the block before, write its columns; their variances are added. With `heads`
    they are value projections: attention mixes what they wrote over tokens, not over columns. `why_not` says why none can serve.
    """

    layers: tuple[str, ...] = ()
    previous: bool = False
    heads: bool = False
    why_not: str | None = None


def producers(model: Transformer) -> dict[str, Producers]:
    """The producing layers of every group of a block, by the group's name, or why there are none.

    A ReLU between two layers makes a unit's output large or nothing by its sign, so large weights do not tell (paper, section 3);
    gates and the smooth activations pass them on in part.
    """
    block: type[Block] = type(next(iter(model.blocks.values())))
    if issubclass(block, LlamaBlock):
        return {
            "attention_input": Producers(("mlp.down_proj",), previous=True),
            "attention_output": Producers(("self_attn.v_proj",), heads=True),
            "mlp_input": Producers(("self_attn.o_proj",)),
            "mlp_output": Producers(("mlp.up_proj",)),
        }
    if issubclass(block, OPTBlock):
        assert isinstance(model.config, OPTConfig)
        relu = model.config.activation == "relu"
        return {
            "attention_input": Producers(("fc2",), previous=True),
            "attention_output": Producers(("self_attn.v_proj",), heads=True),
            "mlp_input": Producers(("self_attn.out_proj",)),
            "mlp_output": Producers(why_not="a ReLU stands between fc1 and fc2") if relu else Producers(("fc1",)),
        }
    if issubclass(block, GPT2Block):
        assert isinstance(model.config, GPT2Config)
        relu = model.config.activation == "relu"
        return {
            "attention_input": Producers(("mlp.c_proj",), previous=True),
            "attention_output": Producers(("attn.c_attn",), heads=True),
            "mlp_input": Producers(("attn.c_proj",)),
            "mlp_output": Producers(why_not="a ReLU stands between c_fc and c_proj") if relu else Producers(("mlp.c_fc",)),
        }
    if issubclass(block, BertBlock | DistilBertBlock):
        assert isinstance(model.config, EncoderConfig)
        relu = model.config.activation == "relu"
        values, output, wide, narrow = (
            ("attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense")
            if issubclass(block, BertBlock)
            else ("attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")
        )
        return {
            "attention_input": Producers((narrow,), previous=True),
            "attention_output": Producers((values,), heads=True),
            "mlp_input": Producers((output,)),
            "mlp_output": Producers(why_not=f"a ReLU stands between {wide} and {narrow}") if relu else Producers((wide,)),
        }
    if issubclass(block, FalconBlock):
        written = ("self_attention.dense", "mlp.dense_4h_to_h")
        found = {
            "attention_output": Producers(("self_attention.query_key_value",), heads=True),
            "mlp_output": Producers(("mlp.dense_h_to_4h",)),
        }
        # Where attention and MLP stand side by side, both read what the block before wrote.
        parallel = isinstance(model.config, FalconConfig) and model.config.parallel
        for group in block.groups:
            if group not in found:
                first = group != "mlp_input" or parallel
                found[group] = Producers(written, previous=True) if first else Producers(("self_attention.dense",))
        return found
    unknown = Producers(why_not="which layer produces it is not known")
    return {group: unknown for block in model.blocks.values() for group in block.groups}


def has_proxies(model: Transformer, group: str, first: bool) -> bool:
    """Whether a group's columns are scored, in the first block or in a later one."""
    found = producers(model)[group]
    return bool(found.layers) and not (found.previous and first)


def gaps(model: Transformer) -> list[str]:
    """Which groups of layers get no proxy outliers, and why, a sentence each."""
    sentences = []
    for group, found in producers(model).items():
        if found.why_not:
            sentences.append(f"{group}: {found.why_not}")
        elif found.previous:
            sentences.append(f"{group} of the first block: no layer stands before it")
    return sentences


def block_proxies(
    model: Transformer, params: Mapping[str, Float[Array, "..."]], before: Mapping[str, Float[Array, "..."]] | None
) -> dict[str, Scores]:
    """Scores of the input columns of every layer of a block whose producing layers are known, by the layer's weight path.

    Args:
        model: may be abstract.
        params: the block's dense parameters, by path within it.
        before: those of the block before it; `None` for the first.
    """
    block = next(iter(model.blocks.values()))
    scores: dict[str, Scores] = {}
    for group, layers in block.groups.items():
        found = producers(model)[group]
        source = before if found.previous else params
        if not found.layers or source is None:
            continue
        variance = sum(jnp.square(_spread(model, source, layer, found.heads)) for layer in found.layers)
        group_scores = jnp.sqrt(jnp.asarray(variance))
        scores.update({f"{layer}.weight": group_scores for layer in layers})
    return scores


def written_layers(model: Transformer, params: Mapping[str, Float[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
    """The part of a block's dense parameters that `block_proxies` of the next block needs."""
    names = {layer for found in producers(model).values() if found.previous for layer in found.layers}
    return {path: leaf for path, leaf in params.items() if path.removesuffix(".weight") in names}


def model_proxies(model: Transformer, params: Mapping[str, Float[Array, "..."]]) -> dict[str, Scores]:
    """`block_proxies` of all blocks, by full dotted path, from a model's dense parameters by dotted path."""
    scores: dict[str, Scores] = {}
    before: dict[str, Float[Array, "..."]] | None = None
    for key in model.blocks:
        name = ".".join((*model.block_path, key)) + "."
        inside = {path.removeprefix(name): leaf for path, leaf in params.items() if path.startswith(name)}
        scores.update({name + path: found for path, found in block_proxies(model, inside, before).items()})
        before = written_layers(model, inside)
    return scores


def overlap(proxy: Float[Array | np.ndarray, " k"], true: Float[Array | np.ndarray, " k"], count: int) -> float:
    """The share of the `count` columns of the highest true score that are among the `count` of the highest proxy.

    >>> overlap(np.array([1.0, 3.0, 2.0]), np.array([5.0, 6.0, 7.0]), 2)
    1.0
    """
    top = [set(np.argsort(np.asarray(values), kind="stable")[len(values) - count :].tolist()) for values in (proxy, true)]
    return len(top[0] & top[1]) / count if count else 1.0


def _spread(model: Transformer, params: Mapping[str, Float[Array, "..."]], layer: str, heads: bool) -> Scores:
    """The standard deviation of each output unit's incoming weights, in the order of the columns it writes."""
    weight = params[f"{layer}.weight"]
    found = jnp.std(as_matrix(weight, (1,)).astype(jnp.float32), axis=1)
    if not heads:
        return found
    config = model.config
    if isinstance(config, FalconConfig):
        # The fused projection: groups of queries, their key, their value.
        found = found.reshape(config.kv_heads, -1, config.head_size)[:, -1]
    if isinstance(config, GPT2Config):
        # Queries, keys and values of all heads, one behind the other.
        found = found.reshape(3, -1)[2]
    grouped = found.reshape(config.kv_heads, 1, config.head_size)
    return jnp.broadcast_to(grouped, (config.kv_heads, config.heads // config.kv_heads, config.head_size)).reshape(-1)

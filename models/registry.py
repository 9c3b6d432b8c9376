"""From a published configuration to a model without weights."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from quikjax.errors import QuikError, did_you_mean
from quikjax.models.bart import BartConfig, build_bart
from quikjax.models.base import Transformer
from quikjax.models.bert import BertConfig, build_bert
from quikjax.models.distilbert import DistilBertConfig, build_distilbert
from quikjax.models.falcon import FIRST_TYPES, FalconConfig, FalconForCausalLM
from quikjax.models.gpt2 import GPT2Config, GPT2LMHeadModel
from quikjax.models.llama import LlamaConfig, LlamaForCausalLM
from quikjax.models.opt import OPTConfig, OPTForCausalLM
from quikjax.models.roberta import RobertaConfig, build_roberta
from quikjax.models.stops import named_stops, union_of_stops

# model_type: (configuration, model). A new family is one file and one row here.
FAMILIES: dict[str, tuple[type[Any], Callable[..., Transformer]]] = {
    **dict.fromkeys(("bart", "mbart"), (BartConfig, build_bart)),  # mBART to be refused by its own name
    "bert": (BertConfig, build_bert),
    "distilbert": (DistilBertConfig, build_distilbert),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "opt": (OPTConfig, OPTForCausalLM),
    **dict.fromkeys(("falcon", *FIRST_TYPES), (FalconConfig, FalconForCausalLM)),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), (RobertaConfig, build_roberta)),
}


def abstract_model(fields: Mapping[str, Any], dtype: Any = jnp.float32, *, context: int | None = None) -> Transformer:
    """The model that a `config.json` describes, its parameters `ShapeDtypeStruct`s of `dtype`: no memory, no weights.

    `context` takes the place of the context length that the configuration declares. The model's `stops` are those that the
    configuration names; a checkpoint's other files may name more.

    Raises:
        QuikError: `model_type` is missing or unknown, the family refuses a field, or the model's positions do not reach as far
            as `context`.
    """
    kind = fields.get("model_type")
    if kind is None:
        raise QuikError('the configuration has no "model_type"; is it the config.json of a language model?')
    if kind not in FAMILIES:
        raise QuikError(f'models of type "{kind}" are not supported; {did_you_mean(str(kind), FAMILIES)}')
    family, model = FAMILIES[kind]
    config = family.from_published(fields)
    if context is not None:
        config = config.with_context(context)
    abstract = nnx.eval_shape(lambda: model(config, dtype=dtype))
    abstract.stops = union_of_stops(config.vocab_size, named_stops(fields, "the configuration"))
    abstract.published = json.dumps(dict(fields), sort_keys=True, default=str)
    return abstract


def pure_params(model: Transformer) -> dict[str, Any]:
    """The model's parameters as plain nested dictionaries keyed by published names."""
    return nnx.to_pure_dict(nnx.split(model)[1])


def dotted(params: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dictionary flattened to published names, `model.layers.0.mlp.down_proj.weight`. Packed weights are leaves.

    >>> dotted({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    flat = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{name}": leaf for name, leaf in dotted(value).items()})
        else:
            flat[key] = value
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `dotted`.

    >>> nested({"a.b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree

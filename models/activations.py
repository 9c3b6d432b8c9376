"""The functions between the two layers of an MLP, by the names that configurations give them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quikjax.pallas_kernels import api
from quikjax.weights.linear import Produced

_exact = api.Gelu(approximate=False)
_by_tanh = api.Gelu(approximate=True)

# GELU (arXiv 1606.08415) is `x Phi(x)`, or its approximation by tanh, which transformers has three more names for.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    **dict.fromkeys(("gelu", "gelu_python"), _exact),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), _by_tanh),
    "relu": api.Relu(),
    **dict.fromkeys(("silu", "swish"), jax.nn.silu),
    "tanh": jnp.tanh,
}


def activated(name: str, x: Float[Array, "*batch wide"]) -> Float[Array, "*batch wide"] | Produced:
    """The activation of `x`; not yet computed where the layer that reads it may have a kernel that does."""
    function = ACTIVATIONS[name]
    return Produced(function, (x,)) if isinstance(function, api.Producer) else function(x)

"""The functions between the two layers of an MLP, by the names that configurations give them."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

_exact = partial(jax.nn.gelu, approximate=False)
_by_tanh = partial(jax.nn.gelu, approximate=True)

# GELU (arXiv 1606.08415) is `x Phi(x)`, or its approximation by tanh, which transformers has three more names for.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    **dict.fromkeys(("gelu", "gelu_python"), _exact),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), _by_tanh),
    "relu": jax.nn.relu,
    **dict.fromkeys(("silu", "swish"), jax.nn.silu),
    "tanh": jnp.tanh,
}

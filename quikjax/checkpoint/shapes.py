"""Compare parameters with those of a configuration by name and shape, and name every difference."""

from collections.abc import Mapping

from quikjax.errors import QuikError
from quikjax.models.base import Transformer
from quikjax.models.registry import dotted, pure_params

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(model: Transformer) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model, abstract or not, by full name."""
    return {path: tuple(leaf.shape) for path, leaf in dotted(pure_params(model)).items()}


def check_parameters(expected: Shapes, found: Shapes, *, whole: bool) -> None:
    """Compare parameters with the configuration's; with `whole`, none may be missing.

    Raises:
        QuikError: naming every parameter that is missing, unknown or of another shape.
    """
    wrong = [
        f"{path} has shape {shape}, the configuration says {expected[path]}"
        for path, shape in sorted(found.items())
        if path in expected and shape != expected[path]
    ]
    wrong += [f"{path} is not in the configuration" for path in sorted(set(found) - set(expected))]
    if whole:
        wrong += [f"{path} is missing" for path in sorted(set(expected) - set(found))]
    if wrong:
        listed = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise QuikError(f"the parameters are not those of the configuration: {listed}")

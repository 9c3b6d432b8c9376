"""`quikjax recipe`: the recipes by name, and one of them as the JSON file that every command takes in its place."""

from typing import Annotated

import typer

from quikjax.cli.options import BlockSize, Keep, Method, Outliers, Proxy, choose_recipe


def recipe(
    name: Annotated[str | None, typer.Argument(help="A recipe's name, or a .json file; left out, all names.")] = None,
    outliers: Outliers = None,
    block: BlockSize = None,
    proxy: Proxy = None,
    method: Method = None,
    keep: Keep = None,
) -> None:
    """Print a recipe as JSON, to be changed and given to --recipe as a file; without a name, a table of all recipes.

    The options change it as they do in `quantize`.
    """
    from quikjax.cli.printing import show
    from quikjax.errors import QuikError
    from quikjax.quantizing.recipe import RECIPES
    from quikjax.reports.tables import markdown_table

    if name is not None:
        show(choose_recipe(name, outliers, block, proxy, method, keep).model_dump_json(indent=2))
        return
    if any(option is not None for option in (outliers, block, proxy, method, keep)):
        raise QuikError("these options change one recipe; name it: quikjax recipe quik-4b --outliers 1/16")
    rows = []
    for one in RECIPES.values():
        widths = dict.fromkeys(f"W{rule.weight_bits}A{rule.activation_bits}" for rule in one.rules)
        methods = dict.fromkeys(rule.method for rule in one.rules)
        rows.append((one.name, ", ".join(widths), ", ".join(methods)))
    show(markdown_table(("recipe", "weights and activations", "method"), rows))

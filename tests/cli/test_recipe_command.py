"""`quikjax recipe`: every name, and JSON that is the recipe."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from quikjax.quantizing.recipe import RECIPES, find_recipe

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_all_recipes_stand_in_a_table(quikjax_command: Run) -> None:
    done = quikjax_command("recipe")
    assert done.returncode == 0, done.stderr
    rows = {cells[0].strip(): cells[1].strip() for cells in (line.split("|")[1:] for line in done.stdout.splitlines()[2:])}
    assert list(rows) == list(RECIPES)
    assert (rows["quik-4b"], rows["w4a8"], rows["nf4"], rows["fp"]) == ("W8A8, W4A4", "W4A8", "W4A16", "")


def test_what_is_printed_is_the_recipe(quikjax_command: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    done = quikjax_command("recipe", "quik-4b+", "--outliers", "1/8")
    assert done.returncode == 0, done.stderr
    file.write_text(done.stdout)
    assert find_recipe(file) == find_recipe("quik-4b+").with_outliers(0.125)
    again = quikjax_command("recipe", file)
    assert again.stdout == done.stdout


def test_options_need_a_recipe(quikjax_command: Run) -> None:
    done = quikjax_command("recipe", "--outliers", "3")
    assert done.returncode == 1
    assert "these options change one recipe; name it: quikjax recipe quik-4b --outliers 1/16" in done.stderr

"""The rooms of the package stand on floors: an import runs down, never up, and no two modules import each other.

Read from the sources with `ast`, so that imports inside functions count as well; those only for a type checker do not.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "quikjax"

# From the ground up. A room imports from itself and from what stands before it.
FLOORS = (
    ("version",),
    ("errors",),
    ("files", "rounds", "speed_tests"),
    ("executables",),
    ("pallas_kernels",),
    ("texts", "algorithms"),
    ("weights",),
    ("models",),
    ("loading",),
    ("testing",),
    ("generation", "encoding"),
    ("checkpoint",),
    ("evaluation",),
    ("quantizing",),
    ("training",),
    ("planning",),
    ("reports",),
    ("study",),
    ("cli",),
)
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, the linked folders included."""
    found = {}
    for top in (ROOT, ROOT / "models", ROOT / "pallas_kernels"):
        for path in top.rglob("*.py"):
            parts = ("quikjax", *path.relative_to(ROOT).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(tree: ast.Module) -> set[str]:
    """The package's modules that a module imports, for running (not for type checking only)."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "quikjax"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module and node.module.split(".")[0] == "quikjax":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found.add(whole if whole in MODULES else node.module)
    return found


GRAPH = {name: imports(ast.parse(path.read_text(encoding="utf-8"))) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def test_the_graph_is_that_of_the_package() -> None:
    assert "quikjax.pallas_kernels.reference" in GRAPH["quikjax.weights.quik"]
    assert "quikjax.quantizing.params" in GRAPH["quikjax.quantizing.model"]
    assert len(GRAPH) > 80


def test_every_module_has_a_room() -> None:
    assert {room(name) for name in MODULES if name != "quikjax"} <= set(HEIGHT)


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name != "quikjax"))
def test_imports_run_down(name: str) -> None:
    for target in GRAPH[name]:
        assert target != "quikjax", f"{name} imports the package's own __init__"
        if room(target) != room(name):
            assert HEIGHT[room(target)] < HEIGHT[room(name)], f"{name} imports {target}, which does not stand below it"


def test_no_imports_run_in_circles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "a circle of imports: " + " -> ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for target in sorted(GRAPH.get(name, ())):
            visit(target, (*path, name))
        done.add(name)

    for name in sorted(GRAPH):
        visit(name, ())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_docstrings_open_with_what_they_are_about(name: str) -> None:
    """A noun or a verb that one would search for, not "What ..."."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            assert not (ast.get_docstring(node) or "").startswith("What "), (
                f"{name}: {getattr(node, 'name', 'its own docstring')}"
            )

"""The structure of the package: what imports what, and what is public."""

from __future__ import annotations

import ast
import graphlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import paramstats

PACKAGE = Path(paramstats.__file__).parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages([str(PACKAGE)], "paramstats.")
    if not module.name.endswith("_native")
)


def parsed(module: str) -> ast.Module:
    path = PACKAGE.parent / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text())


def imported(module: str) -> dict[str, list[str]]:
    """The paramstats modules that `module` imports, also inside functions, and the names taken.

    Imports under `if TYPE_CHECKING` do not count: they do not run.
    """
    tree = parsed(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paramstats"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full in MODULES
                found.setdefault(full if is_module else node.module, []).append(alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("paramstats"):
                    found.setdefault(alias.name, [])
    return found


def test_there_is_no_import_cycle():
    graph = {module: set(imported(module)) for module in [*MODULES, "paramstats"]}
    # The root's lazy attributes import these; they never import the root.
    lazy = ("checkpoints", "integrations", "_history")
    graph["paramstats"] |= {f"paramstats.{name}" for name in lazy}
    assert len(graph) > 50 and sum(map(len, graph.values())) > 200
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("module", [*MODULES, "paramstats"])
def test_private_names_stay_in_their_module(module):
    for source, names in imported(module).items():
        for name in names:
            is_module = source.endswith(f".{name}")
            is_public = not name.startswith("_") or name == "__version__"
            assert is_module or is_public, f"{module} imports {name} from {source}"


def private_attributes(tree: ast.Module) -> set[str]:
    """The private attributes and methods of the classes in a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            found |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_private_attributes_are_read_in_their_module_only():
    trees = {module: parsed(module) for module in MODULES}
    private = {module: private_attributes(tree) for module, tree in trees.items()}
    for module, tree in trees.items():
        others = set().union(*(names for other, names in private.items() if other != module))
        read = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        }
        assert not (read & others) - private[module], module


def test_every_public_name_has_its_own_docstring():
    for name in paramstats.__all__:
        thing = getattr(paramstats, name)
        if name != "__version__":
            assert inspect.getdoc(thing), name
    for cls in (
        paramstats.Summary,
        paramstats.TensorStats,
        paramstats.ParamStats,
        paramstats.History,
    ):
        for name, member in inspect.getmembers(cls):
            if not name.startswith("_") and (callable(member) or isinstance(member, property)):
                assert inspect.getdoc(member), f"{cls.__name__}.{name}"


def test_subpackages_are_reachable_and_lazy():
    code = (
        "import sys, torch, paramstats\n"
        "lazy = ('checkpoints', 'integrations')\n"
        "assert not any(f'paramstats.{name}' in sys.modules for name in lazy)\n"
        "assert paramstats.checkpoints.summarize_file and paramstats.integrations\n"
        "assert set(lazy) < set(dir(paramstats))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_function_hides_a_module_of_its_name():
    for name in paramstats.__all__:
        assert not inspect.ismodule(sys.modules.get(f"paramstats.{name}")) or inspect.ismodule(
            getattr(paramstats, name)
        )


FACTORIES = {
    f"torch.{name}"
    for name in ("arange", "empty", "full", "ones", "scalar_tensor", "tensor", "zeros")
}


@pytest.mark.parametrize("module", MODULES)
def test_tensors_that_are_made_state_dtype_and_device(module):
    """The defaults of the process belong to the user."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES:
            stated = {keyword.arg for keyword in node.keywords}
            assert stated >= {"dtype", "device"}, ast.unparse(node)

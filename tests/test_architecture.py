"""What docs/architecture.md says of the structure: the order of the folders, no circles, small files and functions."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import symtele_cuda as st

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "symtele_cuda"
MODULES = sorted(PACKAGE.rglob("*.py"))
# From the ground up: what stands on one line may import what stands before it.
ORDER = [
    {"errors", "checks", "report", "transaction", "_version", "spelling"},
    {"activations"},
    {"kernels"},
    {"operator", "info", "sites"},
    {"model"},
    {"measure", "optimizers", "plasticity"},
    {"orbits"},
    {"objectives"},
    {"methods", "settings"},
    {"guards"},
    {"search"},
    {"outcome"},
    {"teleport"},
    {"schedule"},
    {"teleporter"},
    {"demo"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, without the package's name."""
    package = dotted(path).split(".") if path.name == "__init__.py" else dotted(path).split(".")[:-1]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                whole = [*base, alias.name]
                is_module = PACKAGE.joinpath(*whole).with_suffix(".py").exists() or PACKAGE.joinpath(*whole).is_dir()
                yield ".".join(whole if is_module else base)


GRAPH = {dotted(path): sorted(set(imports_of(path)) - {""}) for path in MODULES}


def test_no_folder_imports_from_one_above_it() -> None:
    for module, imported in GRAPH.items():
        own = module.split(".")[0]
        if own in ("", "__main__"):
            continue
        for name in imported:
            other = name.split(".")[0]
            assert other == own or LEVEL[other] < LEVEL[own], f"{module} imports {name}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way, module))
        if module not in done:
            for name in GRAPH.get(module, []):
                visit(name, (*way, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_no_module_is_longer_than_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_functions_of_orbits_and_search_have_at_most_six_parameters() -> None:
    for path in MODULES:
        if dotted(path).split(".")[0] in ("orbits", "search"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    given = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
                    assert len(given) <= 6, f"{dotted(path)}.{node.name}: {given}"
    assert len(inspect.signature(st.teleport_mlp).parameters) <= 8


def test_no_module_of_orbits_or_search_looks_for_the_layer_before() -> None:
    for path in MODULES:
        if dotted(path).split(".")[0] in ("orbits", "search"):
            code = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.DOTALL)
            assert "layer - 1" not in code, dotted(path)


def test_the_page_names_every_folder_and_file_of_the_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for name in LEVEL.keys() - {"_version", "info", "demo", "optimizers", "spelling"}:
        assert f"`{name}`" in page or f"`{name}/`" in page, name


def test_the_wheel_has_no_experiments() -> None:
    import experiments

    assert not Path(experiments.__file__).is_relative_to(PACKAGE)
    for module in GRAPH:
        assert "experiments" not in module
    assert not re.search(r"^(from|import) experiments", "\n".join(p.read_text() for p in MODULES), flags=re.MULTILINE)

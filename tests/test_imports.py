"""Imports only ever point down the layers, and no two packages import each other."""

import ast
from pathlib import Path

import detkit

PACKAGE = Path(detkit.__file__).parent
LAYERS = (
    ("errors", "hints", "registry", "structures"),
    ("ops", "distributed"),
    ("config", "layers", "data", "weights", "inference"),
    ("models",),
    ("viz",),
    ("engine",),
    ("checks", "export"),
    ("api", "benchmarks", "tasks", "cli", "config_docs", "__init__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _package(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(file: Path) -> list[str]:
    """The detkit packages a file imports, by their first name below detkit."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "detkit":
            names += [node.module] if "." in node.module else [f"detkit.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.startswith("detkit.")]
    return [name.split(".")[1] for name in names]


def test_every_import_points_down():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        own = _package(file)
        wrong += [f"{file}: {name}" for name in _imports(file) if LEVEL[name] > LEVEL[own]]
    assert not wrong


def test_packages_do_not_import_each_other():
    """Those of one layer may import one another, but not in a circle."""
    uses: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        uses.setdefault(_package(file), set()).update(_imports(file))
    for package in uses:
        reached, todo = set(), [*uses[package] - {package}]
        while todo:
            name = todo.pop()
            if name not in reached:
                reached.add(name)
                todo += uses.get(name, set()) - {name}
        assert package not in reached, f"{package} imports, by way of others, itself: {sorted(uses[package])}"


def test_nothing_forbidden_is_imported():
    for file in PACKAGE.rglob("*.py"):
        assert not {"ultralytics", "mmcv", "mmdet", "pickle"} & set(_roots(file)), file


def _roots(file: Path) -> list[str]:
    tree = ast.parse(file.read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return [name.split(".")[0] for name in names]

"""The one direction of imports: a folder imports only from folders to its left."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "mvsplit"
ORDER = (
    {"kernels"},
    {"residuals"},
    {"models"},
    {"flow", "data", "diagnostics"},
    {"sampling", "training"},
    {"evaluation", "hub"},
    {"presets"},
    {"reproduce"},  # trains, probes and judges; only its command is above it
    {"cli"},
    {"__main__"},
)
RANK = {folder: rank for rank, folders in enumerate(ORDER) for folder in folders}


def imported_modules(source: str, package: tuple[str, ...]) -> set[str]:
    """Dotted names that a module of `package` imports; relative imports are made absolute."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parent = ".".join((*base, *filter(None, [node.module])))
            names |= {f"{parent}.{alias.name}" for alias in node.names}
    return names


def violations(source: str, path: Path) -> list[str]:
    """What the module at `path` (relative to the package) imports and may not."""
    folder = path.parts[0].removesuffix(".py")
    wrong = []
    for name in sorted(imported_modules(source, ("mvsplit", *path.parts[:-1]))):
        top, *rest = name.split(".")
        if top == "triton" and folder != "kernels":
            wrong.append(f"{path}: {name} (Triton belongs in kernels/)")
        if top != "mvsplit" or rest[:1] in ([], ["errors"], ["__version__"], [folder]):
            continue
        if folder not in RANK or rest[0] not in RANK or RANK[rest[0]] >= RANK[folder]:
            wrong.append(f"{path}: {name} is not to the left of {folder}")
    return wrong


def test_every_module_imports_only_from_its_left():
    modules = [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]
    assert len(modules) > 20
    wrong = [line for p in modules for line in violations(p.read_text(), p.relative_to(ROOT))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kernels/a.py", "from mvsplit.residuals import Rule"),
        ("kernels/a.py", "import mvsplit.models.dit"),
        ("kernels/fused/a.py", "from ...models import DiT"),
        ("kernels/a.py", "from .. import models"),
        ("flow/a.py", "from mvsplit.data import Digits"),
        ("hub/a.py", "def f():\n    from mvsplit import evaluation"),
        ("presets.py", "from .cli import main"),
        ("errors.py", "import mvsplit.kernels"),
        ("models/a.py", "import triton.language as tl"),
        ("cli/a.py", "from mvsplit.unknown import x"),
    ],
)
def test_a_wrong_import_is_found(path, line):
    assert violations(line, Path(path))

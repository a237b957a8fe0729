"""Data flows one way: a module imports only from its own level or below, in the order of LEVELS."""

from __future__ import annotations

import ast
from pathlib import Path

import dyvte

PACKAGE = Path(dyvte.__file__).parent
# One total order; a module may import what stands before it.
ORDER = [
    *["errors", "registry", "files", "formatting", "progress", "plotting"],
    *["shipped", "config", "fields", "distributed", "spans", "gates"],
    *["policies", "backbones", "decoder", "reductions", "runtime", "costs"],
    *[
        "data",
        "teacher",
        "objectives",
        "calibration",
        "tasks",
        "evaluation",
        "comparison",
        "reporting",
        "training",
    ],
    *["analysis", "plugins", "commands", "cli", "__main__"],
]
LAZY_ONLY = {"deepspeed", "wandb", "datasets", "sklearn", "matplotlib", "peft", "lmms_eval", "vlmeval"}


def _imports(path: Path):
    """(module name, imported at import time) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            lazy = True
        if lazy:
            inside.update(id(n) for n in ast.walk(node))
    for node in ast.walk(tree):
        eager = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, eager
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(PACKAGE).parts[: -node.level] if node.level else ()
            prefix = ("dyvte", *above) if node.level else ()
            yield ".".join([*prefix, *([node.module] if node.module else [])]), eager
            if node.module == "dyvte":
                for alias in node.names:
                    yield f"dyvte.{alias.name}", eager


def test_imports_point_downwards_and_heavy_packages_are_lazy():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.parts == ("__init__.py",):
            continue  # the public face, lazy by construction
        own = relative.parts[0].removesuffix(".py")
        assert own in ORDER, f"{relative}: which level is {own!r}?"
        for name, eager in _imports(path):
            parts = name.split(".")
            if parts[0] == "dyvte" and len(parts) > 1 and parts[1] in ORDER:
                if ORDER.index(parts[1]) > ORDER.index(own):
                    wrong.append(f"{relative} imports {name}, which stands above it")
            elif parts[0] in LAZY_ONLY and eager and own != "plugins":
                wrong.append(f"{relative} imports {name} at import time")
    assert not wrong, "\n".join(wrong)

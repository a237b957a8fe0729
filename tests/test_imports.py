"""Data flows one way: a module imports only from below, in one order of rooms, and within a room too."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import dyvte

PACKAGE = Path(dyvte.__file__).parent
# One total order; a module may import what stands before it.
ORDER = [
    *["errors", "registry", "files", "entries", "formatting", "heap", "progress", "plotting"],
    *["shipped", "groups", "config", "fields", "distributed", "spans", "gates"],
    *["policies", "backbones", "decoder", "reductions", "runtime", "costs"],
    *[
        "data",
        "teacher",
        "objectives",
        "calibration",
        "tracing",
        "readers",
        "tasks",
        "evaluation",
        "comparison",
        "reporting",
        "training",
    ],
    *["analysis", "serving", "plugins", "commands", "cli", "__main__"],
]
# Within a room, from the ground up: a module or sub-package named here imports none that stands behind it.
# Others may stand anywhere, but nowhere in a circle.
FLOORS = {
    "backbones": ["config", "convert", "describe", "load"],
    "calibration": ["operating_points", "compute", "risk", "apply", "tables"],
    "comparison": ["records", "router", "tuned_gates", "tuned_router", "traces", "runs", "table", "compare"],
    "costs": ["layers", "prefill", "visual", "reductions"],
    "data": ["samples", "images", "llava", "sources", "scenes"],
    "evaluation": ["questions", "scores", "run_log", "checks", "generation", "askable", "identity", "runner"],
    "gates": ["features", "architectures", "config", "files", "reference", "stack"],
    "policies": ["base", "never"],
    "reductions": ["base", "profile", "fastv"],
    "reporting": ["page", "sections", "section_tables", "report"],
    "runtime": [
        "cache",
        "replay",
        "prompt_memory",
        "layer_rows",
        "prefill",
        "engine",
        "session",
        "visual_exit",
    ],
    "readers": ["rows", "tables", "files"],
    "tasks": ["records", "predictions", "submissions", "answers", "base", "choices", "gqa", "mmbench"],
    "tracing": ["config", "zero", "sharded", "traces"],
    "training": [
        *["target", "config", "zero", "loop", "gate_training", "running", "summary", "candidates", "train"],
        "dryrun",
    ],
    "teacher": [
        "slots",
        "texts",
        "images",
        "streams",
        "trace",
        "manifest",
        "store",
        "config",
        "encoder",
        "teacher",
        "pipeline",
    ],
}
LARGEST_SHARE = 0.15
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


def _modules() -> dict[str, Path]:
    """Dotted name to file; packages by their ``__init__``."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _inside_rooms() -> dict[str, set[str]]:
    """Each module to what it imports of its own room, at whatever time; imports for types do not count."""
    modules = _modules()
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            for inner in ast.walk(node)
        }
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and id(node) not in typing:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= {one if one in modules else node.module for one in whole}
        room = name.split(".")[1:2]
        found[name] = {one for one in imported - {name} if one.split(".")[1:2] == room and room}
    return found


def test_within_a_room_nothing_is_imported_in_a_circle():
    try:
        list(TopologicalSorter(_inside_rooms()).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' <- '.join(error.args[1])}") from None


def test_within_a_room_imports_point_downwards():
    wrong = []
    for name, imported in _inside_rooms().items():
        floors = FLOORS.get(name.split(".")[1] if "." in name else "", [])
        for other in imported:
            here, there = (one.split(".")[2:3] for one in (name, other))
            placed = here and there and here[0] in floors and there[0] in floors
            if placed and floors.index(there[0]) > floors.index(here[0]):
                wrong.append(f"{name} imports {other}, which stands above it")
    assert not wrong, "\n".join(wrong)


def test_floors_name_what_is_there():
    modules = set(_modules())
    gone = [f"{room}.{one}" for room, floors in FLOORS.items() for one in floors]
    assert not [name for name in gone if f"dyvte.{name}" not in modules]


def test_no_room_is_too_large():
    lines: dict[str, int] = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        lines[room] = lines.get(room, 0) + len(path.read_text(encoding="utf-8").splitlines())
    total = sum(lines.values())
    large = {room: f"{count / total:.1%}" for room, count in lines.items() if count > LARGEST_SHARE * total}
    assert not large, f"of {total} lines: {large}"

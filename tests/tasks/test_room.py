"""The room itself: no torch, one registration for each benchmark, and what a new one costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import dyvte
from dyvte.readers.files import table_images
from dyvte.tasks.base import TASKS, Benchmark, Predictions, Question, get_benchmark

ROOM = Path(dyvte.__file__).parent / "tasks"
HEAVY = ("torch", "transformers", "pyarrow", "pandas", "PIL", "datasets")


def test_nothing_here_imports_torch():
    code = (
        "import sys, json, pkgutil, importlib, dyvte.tasks\n"
        "for module in pkgutil.walk_packages(dyvte.tasks.__path__, 'dyvte.tasks.'):\n"
        "    importlib.import_module(module.name)\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == []


def test_each_benchmark_is_registered_once_in_a_file_of_its_name():
    for name in TASKS:
        task = TASKS.get(name)
        assert task.__module__ == f"dyvte.tasks.{name}"
        assert (task.name, bool(task.title), bool(task.expected_tree)) == (name, True, True)
        assert task.__doc__.strip()
    assert all(f'"{name}"' not in (ROOM / "base.py").read_text() for name in TASKS)


def test_a_new_benchmark_is_a_class(tmp_path):
    class Captions(Benchmark):
        """How many words of the gold caption an answer has."""

        name, title, tables, expected_tree = (
            "captions",
            "Captions",
            ("*captions*.tsv",),
            "  <root>/captions.tsv",
        )

        def table_question(self, row, number, base):
            images = table_images(row, base)
            return Question(
                id=row.identity("index"),
                image=images[0] if images else None,
                text=row.text("question"),
                answer=row.text("answer"),
                image_id=row.identity("index"),
                kind="",
            )

        def hits(self, questions, predictions, dialect):
            shared = [set(q.answer.split()) & set(predictions.texts[q.id].split()) for q in questions]
            return [len(one) / len(q.answer.split()) for q, one in zip(questions, shared, strict=True)]

    TASKS.register(Captions)
    try:
        (tmp_path / "my_captions.tsv").write_text(
            "index\tquestion\tanswer\n7\twhat ?\ta red dog\n8\tand ?\ta cat\n"
        )
        task = get_benchmark("captions")
        questions = task.load(tmp_path, images=False)
        scores = task.score(questions, Predictions({"7": "a dog", "8": "a cat"}))
        assert scores["accuracy"] == 100 * (2 / 3 + 1) / 2
        assert task.statistic(questions, [2 / 3, 1])([[1, 1]])[0] == scores["accuracy"]
    finally:
        TASKS._items.pop("captions")

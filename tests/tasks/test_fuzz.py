"""Damaged question files and answer files: every outcome is a value, or a DyvteError that names the file."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dyvte.errors import DyvteError
from dyvte.readers.tables import PackedImage
from dyvte.tasks.base import Benchmark, Predictions, Question, get_benchmark
from tests.helpers.benchmark_files import CASES, write_benchmark
from tests.helpers.mutations import VALUES, json_bytes, mutated, mutated_json, seeded

NUM_QUESTION_FILES = 1_300
NUM_ANSWER_FILES = 700
TEXT = (".json", ".jsonl", ".tsv", ".csv", ".txt", ".parquet")


@pytest.fixture(scope="module")
def minis(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Every format of every benchmark, once."""
    root = tmp_path_factory.mktemp("minis")
    return {(name, form): write_benchmark(root / name / form, name, form) for name, form in CASES}


def _damaged(path: Path, data: bytes, draw: random.Random) -> bytes:
    """Bytes at random, or a file in order whose content is not."""
    if draw.random() < 0.35:
        return mutated(data, draw)
    if path.suffix == ".parquet":
        return _other_columns(path, draw)
    if path.suffix == ".tsv" or path.name.endswith("question.csv"):
        return _other_cells(data, draw)
    try:
        content = json.loads(data)
        return json_bytes(mutated_json(content, draw))
    except ValueError:
        if path.suffix != ".jsonl" and not data.startswith(b"{"):
            return mutated(data, draw)
        rows = [json.loads(line) for line in data.decode().split("\n") if line]
        return json_bytes(mutated_json(rows, draw), lines=True)


def _other_columns(path: Path, draw: random.Random) -> bytes:
    """The table with a column lost, renamed or filled with something else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, target = pq.read_table(path), path.with_name("fuzz.tmp")
    at = draw.randrange(table.num_columns)
    kind, name = draw.choice(("fill", "fill", "lose", "rename")), table.column_names[at]
    if kind == "lose":
        other = table.remove_column(at)
    elif kind == "rename":
        other = table.rename_columns([f"{one}x" if one == name else one for one in table.column_names])
    try:
        if kind == "fill":
            values = pa.array([draw.choice(VALUES)] * table.num_rows)
            other = table.set_column(at, name, values)
        pq.write_table(other, target, row_group_size=2)
    except (ValueError, TypeError, OverflowError, pa.ArrowException):  # no column can hold that value
        pq.write_table(table.slice(0, draw.randrange(table.num_rows + 1)), target)
    data = target.read_bytes()
    target.unlink()
    return data


def _other_cells(data: bytes, draw: random.Random) -> bytes:
    """The table with cells replaced, a column renamed, or rows lost or doubled."""
    rows = list(csv.reader(io.StringIO(data.decode(), newline=""), delimiter="\t"))
    for _ in range(draw.choice((1, 1, 2, 3))):
        row = draw.choice(rows)
        kind = draw.choice(("cell", "cell", "cell", "lose", "double", "wide"))
        if kind == "cell":
            row[draw.randrange(len(row))] = str(draw.choice(VALUES)).encode(errors="replace").decode()
        elif kind == "lose" and len(rows) > 1:
            rows.remove(row)
        elif kind == "double":
            rows.append(list(row))
        elif kind == "wide":
            row.append("x")
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter="\t", lineterminator="\n").writerows(rows)
    return stream.getvalue().encode()


def _used(benchmark: Benchmark, questions: list[Question]) -> None:
    """What commands do with questions: ask them, look at their images, score answers to them."""
    for question in questions:
        assert isinstance(benchmark.prompt(question), str)
        assert not question.text.endswith(("\nNone", "\nnan"))
        for image in question.images:
            if isinstance(image, PackedImage):
                image.read()
    answers = Predictions({q.id: q.answer or "x" for q in questions})
    for dialect in benchmark.dialects:
        json.dumps(benchmark.score(questions, answers, dialect))
    json.dumps([q.text for q in questions]).encode()


def _outcome(read: Callable[[], Any], root: Path | None, told: str) -> Any:
    """What reading gives; None for a DyvteError, which names a file below ``root`` where one is given."""
    try:
        return read()
    except DyvteError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{told}: {error!r}") from error
    assert root is None or str(root) in message, f"{told}: the error names no file: {message}"
    return None


def _try_questions(root: Path, benchmark: Benchmark, draw: random.Random, number: int) -> bool:
    """Whether a damaged copy of one question file of a mini can be read all the same."""
    path = draw.choice(sorted(file for file in root.rglob("*") if file.suffix in TEXT))
    data, told = path.read_bytes(), f"file {number}, {benchmark.name} in {root.name}, {path.name}"
    try:
        path.write_bytes(_damaged(path, data, draw))
        read = partial(benchmark.load, root, images=draw.random() < 0.5)
        questions = _outcome(read, root, told)
        if questions is not None:
            _outcome(partial(_used, benchmark, questions), None, told)
    except BaseException:
        shutil.copy(path, root.parent / f"failed-{path.name}")
        raise
    finally:
        path.write_bytes(data)
    return questions is not None


def test_question_files(minis):
    draw = seeded(20260402)
    read = 0
    for number in range(NUM_QUESTION_FILES):
        name, form = draw.choice(CASES)
        read += _try_questions(minis[name, form], get_benchmark(name), draw, number)
    assert NUM_QUESTION_FILES // 10 < read < 9 * NUM_QUESTION_FILES // 10


def _answer_files(name: str, form: str, root: Path, folder: Path) -> dict[str, bytes]:
    """Files of answers to a mini benchmark: ours, LLaVA's, the submission, a table, a workbook."""
    from dyvte.readers.xlsx import write_xlsx

    benchmark = get_benchmark(name)
    questions = benchmark.load(root, images=False)
    answers = {q.id: q.answer or "x" for q in questions}
    ours = [{"question_id": key, "prediction": text} for key, text in answers.items()]
    llava = [
        {"question_id": identity, "prompt": f"<image>\n{benchmark.prompt(q)}", "text": answers[q.id]}
        for q in questions
        for identity in (q.image_id if name in ("mme", "textvqa") else q.id,)
    ]
    submitted = benchmark.write_submission(folder, questions, Predictions(answers))
    files = {submitted.name: submitted.read_bytes()} if submitted.is_file() else {}
    files |= {"ours.jsonl": json_bytes(ours, lines=True), "llava.jsonl": json_bytes(llava, lines=True)}
    rows = [["index", "prediction"], *([key, text] for key, text in answers.items())]
    files["table.tsv"] = "".join(f"{key}\t{text}\n" for key, text in rows).encode()
    return files | {"book.xlsx": write_xlsx(folder / "book.xlsx", rows).read_bytes()}


def _try_answers(
    path: Path, data: bytes, benchmark: Benchmark, questions: list[Question], draw: random.Random, told: str
) -> bool:
    """Whether a damaged file of answers can be read all the same."""
    path.write_bytes(data)
    if path.suffix == ".xlsx" and draw.random() < 0.7:
        damaged = _other_sheet(data, draw)
    else:
        damaged = mutated(data, draw) if path.suffix == ".tsv" else _damaged(path, data, draw)
    path.write_bytes(damaged)
    found = _outcome(partial(benchmark.read_predictions, path, questions), path, told)
    if found is not None:
        _outcome(lambda: json.dumps(benchmark.score(questions, found)), None, told)
    return found is not None


def test_answer_files(minis, tmp_path):
    draw = seeded(20260403)
    read, files, questions = 0, {}, {}
    for case in CASES:
        (tmp_path / "-".join(case)).mkdir()
        files[case] = _answer_files(*case, minis[case], tmp_path / "-".join(case))
        questions[case] = get_benchmark(case[0]).load(minis[case], images=False)
    for number in range(NUM_ANSWER_FILES):
        case = draw.choice(CASES)
        name, data = draw.choice(sorted(files[case].items()))
        path, told = tmp_path / "-".join(case) / name, f"file {number}, {case} {name}"
        read += _try_answers(path, data, get_benchmark(case[0]), questions[case], draw, told)
    assert NUM_ANSWER_FILES // 10 < read < 9 * NUM_ANSWER_FILES // 10


def _other_sheet(data: bytes, draw: random.Random) -> bytes:
    """A whole workbook whose sheet is damaged."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        for part in old.namelist():
            content = old.read(part)
            new.writestr(part, mutated(content, draw) if part.endswith("sheet1.xml") else content)
    return stream.getvalue()


def test_the_examples_are_whole(minis, tmp_path):
    """Undamaged, every file is read: what the tests above damage is good."""
    for case in CASES:
        folder = tmp_path / "-".join(case)
        folder.mkdir()
        benchmark = get_benchmark(case[0])
        questions = benchmark.load(minis[case])
        _used(benchmark, questions) if case[0] != "mmvet" else None
        for name, data in _answer_files(*case, minis[case], folder).items():
            (folder / name).write_bytes(data)
            found = benchmark.read_predictions(folder / name, questions)
            assert {q.id for q in questions} <= found.texts.keys()

"""Files of answers: ours, LLaVA's, VLMEvalKit's workbooks and tables, and files for servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.data.defects import Unusable, check_text
from dyvte.errors import DataError, ScoreError
from dyvte.readers.rows import Row, read_json, read_jsonl, read_rows, rows_of, shown
from dyvte.readers.tables import read_tsv
from dyvte.readers.xlsx import read_xlsx
from dyvte.tasks.records import Predictions, Question

_ID_KEYS = ("index", "question_id", "id")
_TEXT_KEYS = ("prediction", "text")


def read_answers(path: Path) -> Predictions:
    """Raw answers: jsonl (our ``predictions.jsonl``, LLaVA's ``question_id`` and ``text``), or VLMEvalKit's
    table or workbook.

    Raises
    ------
    DataError
        Not readable as what its name says.
    ScoreError
        A row without id or text, or an id that occurs twice.
    """
    if path.suffix.lower() == ".xlsx":
        return _tabled(read_xlsx(path), path)
    if path.suffix.lower() == ".tsv":
        return _tabled(list(read_tsv(path, keep_words=True)), path)
    return collected(read_jsonl(path), ("question_id",), _TEXT_KEYS)


def read_json_table(path: Path) -> Predictions | None:
    """VLMEvalKit's table of answers as it writes it to JSON; None for other JSON."""
    content = read_json(path)
    wanted = {"index", "prediction"}
    if isinstance(content, list) and content and all(isinstance(row, dict) for row in content):
        return _tabled(rows_of(content, path), path) if all(wanted <= row.keys() for row in content) else None
    return None


def _tabled(rows: Sequence[Row], path: Path) -> Predictions:
    """Answers from the columns ``index`` (or another id) and ``prediction``.

    An empty cell is an empty answer: a table has no other way to store one.
    """
    if rows and "prediction" not in rows[0]:
        raise ScoreError(f"{path}: no column 'prediction', found {', '.join(rows[0])}")
    filled = [Row({**row, "prediction": row.value("prediction") or ""}, row.where) for row in rows]
    return collected(filled, _ID_KEYS, ("prediction",))


def read_submitted(path: Path, id_key: str, *text_keys: str) -> Predictions:
    """The rows of a submission file, a JSON list, compared as they stand.

    Parameters
    ----------
    path
        The file.
    id_key, text_keys
        Where id and text of a row stand.

    Raises
    ------
    ScoreError
        No list of objects with an id and a text each.
    """
    try:
        rows = read_rows(path)
    except DataError as error:
        raise ScoreError(f'{error}. Expected a list of {{"{id_key}", "{text_keys[0]}"}}') from error
    return collected(rows, (id_key,), text_keys, converted=True)


def read_by_id(path: Path) -> dict[str, Any]:
    """The values of a submission file that is a JSON object, by question id."""
    content = read_json(path, unique_keys=True)
    if not isinstance(content, dict):
        raise ScoreError(f"{path}: expected an object of answers by question id, found {shown(content)}")
    return content


def checked(texts: Mapping[str, Any], where: Path, converted: bool = False) -> Predictions:
    """Predictions from answers by id.

    Parameters
    ----------
    texts
        By question id.
    where
        Their file, for the message.
    converted
        Do they come from a submission file?

    Raises
    ------
    ScoreError
        An answer that is no text.
    """
    for question_id, text in texts.items():
        _check_text(text, f"{where}, question {question_id}")
    return Predictions(texts, converted)


def collected(
    rows: Sequence[Row], id_keys: Sequence[str], text_keys: Sequence[str], *, converted: bool = False
) -> Predictions:
    """Collect id -> text over the rows.

    Parameters
    ----------
    rows
        Of a file of answers.
    id_keys, text_keys
        Where ids and texts stand: under the first of the keys that a row has.
    converted
        See :class:`~dyvte.tasks.records.Predictions`.

    Raises
    ------
    ScoreError
        A row without id or text, or an id that occurs twice.
    """
    texts: dict[str, str] = {}
    for row in rows:
        question_id = answered_id(row, id_keys)
        if question_id in texts:
            raise ScoreError(f"{row.where}: a second prediction for question {question_id!r}")
        texts[question_id] = answer_text(row, text_keys)
    return Predictions(texts, converted)


def answered_id(row: Row, keys: Sequence[str] = ("question_id",)) -> str:
    """The id that a row of answers states.

    Parameters
    ----------
    row
        Of the file.
    keys
        Columns that may hold it.
    """
    try:
        return row.identity(*keys)
    except DataError as error:
        raise ScoreError(str(error)) from error


def answer_text(row: Row, keys: Sequence[str] = ("text",)) -> str:
    """The answer that a row states, under the first of the keys that it has."""
    key = next((key for key in keys if key in row), None)
    if key is None:
        raise ScoreError(f"{row.where}: no text under {' or '.join(map(repr, keys))}")
    _check_text(row[key], f"{row.where}, {key!r}")
    return row[key]


def _check_text(text: Any, where: str) -> None:
    if not isinstance(text, str):
        raise ScoreError(f"{where}: expected a text, found {shown(text)}")
    try:
        check_text(text, where)
    except Unusable as problem:
        raise ScoreError(f"{where}: {problem}") from problem


def joined_by_prompt(
    path: Path,
    questions: Sequence[Question],
    key: Callable[[Question], tuple[str, str]],
    asked: Callable[[str, str], tuple[str, str]],
) -> Predictions | None:
    """LLaVA's answers where ``question_id`` names an image and the prompt tells its questions apart.

    Parameters
    ----------
    path
        LLaVA's file: lines of ``question_id``, ``prompt`` and ``text``.
    questions
        Those that are answered.
    key
        (image, question text) of a question.
    asked
        The same from the ``question_id`` and the ``prompt`` of an answer. Letter case does not count.

    Returns
    -------
    Predictions or None
        None where the file is not of that kind: no prompts, or ids that are the questions' own.

    Raises
    ------
    ScoreError
        An answer to no question, to a question that stands twice under its image, or a second one.
    """
    rows = read_jsonl(path)
    known = {q.id for q in questions}
    if not all("prompt" in row and "text" in row for row in rows) or any(
        answered_id(row) in known for row in rows
    ):
        return None
    ids: dict[tuple[str, str], list[str]] = {}
    for question in questions:
        image, text = key(question)
        ids.setdefault((image, text.lower()), []).append(question.id)
    texts: dict[str, str] = {}
    for row in rows:
        image, text = asked(answered_id(row), answer_text(row, ("prompt",)).replace("<image>", ""))
        found = ids.get((image, text.lower()), [])
        if not found:
            raise ScoreError(f"{row.where}: no such question: {image}, {shown(text)}")
        if len(found) > 1:
            raise ScoreError(
                f"{row.where}: {image} has this question {len(found)} times: give predictions by question id"
            )
        if found[0] in texts:
            raise ScoreError(f"{row.where}: a second prediction for question {found[0]!r}")
        texts[found[0]] = answer_text(row)
    return Predictions(texts)

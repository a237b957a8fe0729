"""ScienceQA, the test questions with an image (Lu et al., 2022).

Sources: ``llava/eval/eval_science_qa.py`` on LLaVA's main branch (``original``; the data set's own evaluation
is of another model interface), ``lmms_eval/tasks/scienceqa/utils.py`` (``lmms``), exact matching of
``vlmeval/utils/matching_util.py`` (``vlmevalkit``). LLaVA's tool counts a missing answer as wrong; here it is
an error. LLaVA's question text is taken from its own file where that is present; otherwise the hint stands
before the question as "Context: ...", as lmms-eval writes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.readers.files import ImageFolder, find_file, find_folder, table_images
from dyvte.readers.rows import Row, is_blank, read_entries, read_json, read_rows, shown
from dyvte.tasks.answers.choices import LETTERS, Options, vlmevalkit_letter, with_options
from dyvte.tasks.base import TASKS, Predictions, Question
from dyvte.tasks.choices import ChoiceBenchmark, gold_index, gold_letter, lettered_options
from dyvte.tasks.predictions import checked, read_by_id
from dyvte.tasks.prompts import strip_suffix
from dyvte.tasks.records import ImageSource


@TASKS.register
class ScienceQA(ChoiceBenchmark):
    """ScienceQA-IMG: text-only questions are excluded."""

    name = "scienceqa"
    title = "ScienceQA"
    submission_name = "scienceqa_results.json"
    expected_tree = (
        "  <root>/                             release, and LLaVA's playground/data/eval/scienceqa\n"
        "    problems.json, pid_splits.json\n"
        "    llava_test_CQM-A.json             (optional: LLaVA's question texts)\n"
        "    images/test/<pid>/image.png       (or test/)\n"
        "  or <root>/ScienceQA-IMG/test-*.parquet (or data/)\n"
        "  or <root>/ScienceQA_TEST.tsv"
    )
    tables = ("ScienceQA_TEST.tsv", "*scienceqa*.tsv")
    shards = ("ScienceQA-IMG/test-*.parquet", "data/test-*.parquet", "test-*.parquet", "*.parquet")
    columns = (("question",), ("answer",), ("choices", "A"))
    shard_columns = ("choices",)

    def sources(self):
        """The release with LLaVA's texts where they are, tables."""
        return self._release, self.table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "problems.json")
        if path is None:
            return None
        problems = read_entries(path)
        texts = _llava_texts(path.parent)
        images = ImageFolder(find_folder(path, "images/test", "test", "images"))
        questions = []
        for pid in _test_ids(path.with_name("pid_splits.json")):
            if pid not in problems:
                raise DataError(f"{path} lacks problem {pid} of pid_splits.json")
            problem = problems[pid]
            if is_blank(problem.get("image")):
                continue
            image = images.of(problem, f"{pid}/{problem.text('image')}")
            questions.append(_question(problem, pid, image, pid, texts.get(pid)))
        return questions

    def table_question(self, row: Row, number: int, base: Path) -> Question | None:
        """Parquet lists the choices and the index of the right one, the TSV has columns and a letter."""
        images = table_images(row, base)
        if not images and "image" in row:
            return None  # text only; a table without images at all says of no question that it has none
        identity = row.identity("index", "id", default=str(number - 1))
        return _question(row, identity, images[0] if images else None, images[0].name if images else identity)

    def read(self, text: str, question: Question, dialect: str) -> str | None:
        """See :func:`read_answer`."""
        return read_answer(text, question.details["options"], dialect)

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """The ``results`` of LLaVA's tool: index of the chosen option by problem, -1 for unread."""
        letters = {q.id: self.read(predictions.texts[q.id], q, "original") for q in questions}
        results = {key: -1 if letter is None else LETTERS.index(letter) for key, letter in letters.items()}
        return {"results": results, "outputs": {q.id: predictions.texts[q.id] for q in questions}}

    def read_submission(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Take the ``outputs``."""
        outputs = read_by_id(path).get("outputs")
        if not isinstance(outputs, dict):
            raise DataError(
                f'{path}: expected {{"results": ..., "outputs": {{pid: text}}}}, found {shown(outputs)}'
            )
        return checked(outputs, path)


_SENTENCE = re.compile(r"The answer is ([A-Z]).")  # the last "." is any character, as in the tool


def read_answer(text: str, options: Options, dialect: str) -> str | None:
    """The letter a tool finds, None for none.

    ``original``: the letter alone, or first in "X. ...", or in the only "The answer is X" that something
    follows on its line; case counts, "A." alone is not read. ``lmms``: the letter alone in any case, or a
    capital before a full stop at the start. ``vlmevalkit``: see
    :func:`~dyvte.tasks.answers.choices.vlmevalkit_letter`.

    Parameters
    ----------
    text
        The answer.
    options
        By letter.
    dialect
        Whose rule.
    """
    if dialect == "vlmevalkit":
        return vlmevalkit_letter(text, options)
    answer = text.strip()  # LLaVA writes stripped answers, lmms-eval strips them
    if dialect == "lmms":
        if len(answer) >= 2 and answer[0].isupper() and answer[1] == ".":
            return answer[0]
        return answer.upper() if len(answer) == 1 else None
    letter = _original(answer)
    return letter if letter in options and letter in tuple("ABCDE") else None


def _original(answer: str) -> str | None:
    if answer in tuple("ABCDE"):
        return answer
    if answer[:1] in tuple("ABCDE") and answer[1:3] == ". ":
        return answer[0]
    found = _SENTENCE.findall(answer)
    return found[0] if len(found) == 1 else None


def _test_ids(path: Path) -> list[str]:
    splits = read_json(path)
    ids = splits.get("test") if isinstance(splits, dict) else None
    if not isinstance(ids, list) or not all(isinstance(one, str | int) for one in ids):
        raise DataError(f'{path}: expected {{"test": [problem ids]}}, found {shown(splits)}')
    return [str(one) for one in ids]


def _llava_texts(folder: Path) -> dict[str, str]:
    """LLaVA's prompts by problem id; empty where its file is not there."""
    path = find_file(folder, "llava_test_CQM-A.json")
    if path is None:
        return {}
    texts = {}
    for row in read_rows(path):
        turns = row.rows("conversations")
        if not turns:
            raise row.error("'conversations' is empty")
        texts[row.identity("id")] = strip_suffix(turns[0].text("value").replace("<image>", ""))
    return texts


def _question(
    row: Row, identity: str, image: ImageSource | None, image_id: str, text: str | None = None
) -> Question:
    options = lettered_options(row, "choices")
    listed = row.value("choices") is not None
    if text is None:
        hint = row.text("hint", default="")
        context = f"Context: {hint}\n" if hint.strip() else ""
        text = with_options(f"{context}{row.text('question')}", options)
    return Question(
        id=identity,
        image=image,
        text=text,
        answer=gold_index(row, options) if listed else gold_letter(row, options),
        image_id=image_id,
        kind=row.text("subject", "category", default=""),
        details={"options": options},
    )

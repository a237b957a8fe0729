"""ScienceQA, the test questions with an image (Lu et al., 2022).

Sources: ``llava/eval/eval_science_qa.py`` (``original``; the data set's own evaluation is of another model
interface), ``lmms_eval/tasks/scienceqa/utils.py`` (``lmms``), exact matching of
``vlmeval/utils/matching_util.py`` (``vlmevalkit``). LLaVA's tool counts a missing answer as wrong; here it is
an error. LLaVA's question text is taken from its own file where that is present; otherwise the hint stands
before the question as "Context: ...", as lmms-eval writes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.tasks.answers.choices import (
    LETTERS,
    lettered,
    options_of,
    vlmevalkit_letter,
    with_options,
)
from dyvte.tasks.base import LETTER_SUFFIX, Predictions, Question, read_json
from dyvte.tasks.common import StandardBenchmark, strip_suffix
from dyvte.tasks.readers.files import ImageFolder, find_file, find_folder, need, table_rows


class ScienceQA(StandardBenchmark):
    """ScienceQA-IMG: text-only questions are left out."""

    name = "scienceqa"
    title = "ScienceQA"
    suffix = LETTER_SUFFIX
    submission_name = "scienceqa_results.json"
    expected_tree = (
        "  <root>/                             release, and LLaVA's playground/data/eval/scienceqa\n"
        "    problems.json, pid_splits.json\n"
        "    llava_test_CQM-A.json             (optional: LLaVA's question texts)\n"
        "    images/test/<pid>/image.png       (or test/)\n"
        "  or <root>/ScienceQA-IMG/test-*.parquet (or data/)\n"
        "  or <root>/ScienceQA_TEST.tsv"
    )

    def sources(self):
        """The release with LLaVA's texts where they are, tables."""
        return self._release, self._table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "problems.json")
        if path is None:
            return None
        problems = read_json(path)
        splits = read_json(path.parent / "pid_splits.json")
        texts = _llava_texts(path.parent)
        images = ImageFolder(find_folder(path, "images/test", "test", "images"))
        questions = []
        for pid in splits["test"]:
            problem = problems.get(pid)
            if problem is None:
                raise DataError(f"{path} lacks problem {pid} of pid_splits.json")
            if not problem.get("image"):
                continue
            need(problem, ("question", "choices", "answer"), path, pid)
            text = texts.get(str(pid)) if texts is not None else None
            image = images[f"{pid}/{problem['image']}"]
            questions.append(_question(str(pid), image, f"{pid}", problem, text))
        return questions

    def _table(self, root: Path) -> list[Question] | None:
        patterns = ("ScienceQA-IMG/test-*.parquet", "data/test-*.parquet", "test-*.parquet", "*.parquet")
        rows = table_rows(root, ("ScienceQA_TEST.tsv", "*.tsv"), patterns)
        if rows is None:
            return None
        questions = []
        for number, row in enumerate(rows):
            if row.get("image") is None:
                continue
            need(row, ("question", "answer"), root, number)
            if "choices" not in row:
                row = {**row, "choices": options_of(row), "answer": LETTERS.index(row["answer"])}
            identity = str(row.get("index", row.get("id", number)))
            questions.append(_question(identity, row["image"], row["image"].name, row, None))
        return questions

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Read letter equals gold."""
        return [
            read_answer(predictions.texts[q.id], q.details["options"], dialect) == q.answer for q in questions
        ]

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """The ``results`` of LLaVA's tool: index of the chosen option by problem, -1 for unread."""
        results = {}
        for q in questions:
            letter = read_answer(predictions.texts[q.id], q.details["options"], "original")
            results[q.id] = LETTERS.index(letter) if letter in lettered(q.details["options"]) else -1
        outputs = {q.id: predictions.texts[q.id] for q in questions}
        return {"results": results, "outputs": outputs}

    def read_submission(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Take the ``outputs``."""
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("outputs"), dict):
            raise DataError(f'{path}: expected {{"results": ..., "outputs": {{pid: text}}}}')
        return Predictions({str(pid): text for pid, text in content["outputs"].items()})


_SENTENCES = (re.compile(r"The answer is ([A-E])\."), re.compile(r"The answer is ([A-E])"))


def read_answer(text: str, options: Sequence[str], dialect: str) -> str | None:
    """The letter a tool finds, None for none.

    ``original``: the letter alone, or first in "X. ...", or in "The answer is X"; case counts, "A." alone is
    not read. ``lmms``: the letter alone in any case, or a capital before a full stop at the start.
    ``vlmevalkit``: see :func:`~dyvte.tasks.answers.choices.vlmevalkit_letter`.
    """
    if dialect == "vlmevalkit":
        return vlmevalkit_letter(text.strip(), lettered(options))
    if dialect == "lmms":
        answer = text.strip()
        if len(answer) >= 2 and answer[0].isupper() and answer[1] == ".":
            return answer[0]
        return answer.upper() if len(answer) == 1 else None
    # LLaVA writes stripped answers; its tool then makes each line break a sentence end
    answer = text.strip().replace("\n", ". ")
    letter = _original(answer)
    return letter if letter in LETTERS[: min(len(options), 5)] else None


def _original(answer: str) -> str:
    if answer.strip() in tuple("ABCDE"):
        return answer.strip()
    if answer[:1] in tuple("ABCDE") and answer[1:3] == ". ":
        return answer[0]
    for sentence in _SENTENCES:
        match = sentence.search(answer)
        if match:
            return match.group(1)
    return "FAILED"


def _llava_texts(folder: Path) -> dict[str, str] | None:
    """LLaVA's prompts by problem id."""
    path = find_file(folder, "llava_test_CQM-A.json")
    if path is None:
        return None
    return {
        str(row["id"]): strip_suffix(row["conversations"][0]["value"].replace("<image>", ""))
        for row in read_json(path)
    }


def _question(
    identity: str, image: Any, image_id: str, problem: Mapping[str, Any], text: str | None
) -> Question:
    options = [str(choice) for choice in problem["choices"]]
    if text is None:
        context = f"Context: {problem['hint']}\n" if problem.get("hint") else ""
        text = with_options(f"{context}{problem['question']}", options)
    answer = int(problem["answer"])
    if not 0 <= answer < len(options):
        raise DataError(f"question {identity}: gold answer {answer} is none of {len(options)} options")
    return Question(
        id=identity,
        image=image,
        text=text,
        answer=LETTERS[answer],
        image_id=image_id,
        kind=str(problem.get("subject") or problem.get("category") or ""),
        details={"options": options},
    )

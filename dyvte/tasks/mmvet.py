"""MM-Vet (Yu et al., 2023): open questions that a language model grades.

No answer is right or wrong here: the file that ``mm-vet_evaluator.py`` of yuweihao/MM-Vet takes is written
(``{"v1_0": answer, ...}``, as LLaVA's ``convert_mmvet_for_eval.py`` does). The grades it gives
(``<model>_<grader>-grade-<n>runs.json``) can be given back as predictions: ``score`` then computes its
totals. Other tools grade with other models and prompts, so there is one dialect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import ScoreError
from dyvte.formatting import name_some
from dyvte.readers.files import ImageFolder, find_file, find_folder, table_image
from dyvte.readers.rows import Row, read_entries, read_jsonl, shown
from dyvte.tasks.base import TASKS, Benchmark, Predictions, Question
from dyvte.tasks.metrics import percent, ungraded
from dyvte.tasks.predictions import checked, read_by_id
from dyvte.tasks.records import ImageSource

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
_GRADE = "grade:"


@TASKS.register
class MMVet(Benchmark):
    """The 218 questions, graded elsewhere."""

    name = "mmvet"
    title = "MM-Vet"
    dialects = ("original",)
    suffix = ""
    max_new_tokens = 1024  # of LLaVA's script
    submission_name = "mmvet_results.json"
    expected_tree = (
        "  <root>/                                 release (mm-vet.zip)\n"
        "    mm-vet.json\n"
        "    images/v1_0.png ...\n"
        "  or <root>/llava-mm-vet.jsonl beside images/ (LLaVA's playground/data/eval/mm-vet)\n"
        "  or <root>/data/test-*.parquet\n"
        "  or <root>/MMVet.tsv"
    )

    tables = ("MMVet.tsv", "*mmvet*.tsv", "*mm-vet*.tsv")
    shards = ("data/test-*.parquet", "*.parquet")
    columns = (("question",), ("capability", "category"))

    def sources(self):
        """The release, LLaVA's question file, tables."""
        return self._release, self._llava, self.table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "mm-vet.json", "mm-vet/mm-vet.json")
        if path is None:
            return None
        images = ImageFolder(find_folder(path.parent, "images"))
        return [
            _question(row, identity, images.of(row, row.text("imagename")), row.text("imagename"))
            for identity, row in read_entries(path).items()
        ]

    def _llava(self, root: Path) -> list[Question] | None:
        path = find_file(root, "llava-mm-vet.jsonl")
        if path is None:
            return None
        images = ImageFolder(find_folder(path, "images", "mm-vet/images"))
        questions = []
        for row in read_jsonl(path):
            name, entry = row.text("image"), Row({"question": row.value("text")}, row.where)
            identity = f"v1_{row.identity('question_id')}"
            questions.append(_question(entry, identity, images.of(row, name), name))
        return questions

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """Abilities stand in one cell, separated by commas."""
        own = row.identity("question_id", "index", default=str(number - 1))
        identity = own if own.startswith("v1_") else f"v1_{own}"
        return _question(row, identity, *table_image(row, base, identity))

    def correct(
        self, questions: Sequence[Question], predictions: Predictions, dialect: str = "original"
    ) -> list[float]:
        """Grades in [0, 1], where predictions hold grades.

        Raises
        ------
        ScoreError
            Answers that nobody has graded.
        """
        self.check(questions, predictions, dialect)
        grades = self._grades(questions, predictions)
        if grades is None:
            raise ScoreError(
                "MM-Vet answers are graded by a language model: give the submission file to its evaluator"
            )
        return grades

    def score(
        self, questions: Sequence[Question], predictions: Predictions, dialect: str = "original"
    ) -> dict[str, Any]:
        """The evaluator's totals from its grades; for answers, counts and ``graded`` False."""
        self.check(questions, predictions, dialect)
        counts = {"benchmark": self.name, "dialect": dialect, "num_questions": len(questions)}
        grades = self._grades(questions, predictions)
        if grades is None:
            empty = sum(not predictions.texts[q.id].strip() for q in questions)
            why = f"a language model grades MM-Vet: give {self.submission_name} to its evaluator"
            return {**counts, "num_empty": empty, **ungraded(why)}
        abilities = sorted({ability for q in questions for ability in q.details["capability"]})
        per_ability = {
            ability: percent([g for q, g in zip(questions, grades) if ability in q.details["capability"]])
            for ability in abilities
        }
        return {**counts, "graded": True, "accuracy": percent(grades), "per_capability": per_ability}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Also LLaVA's answers, whose ids lack the prefix ``v1_``."""
        found = super().read_predictions(path, questions)
        if found.texts and not any(key.startswith("v1_") for key in found.texts):
            return Predictions({f"v1_{key}": text for key, text in found.texts.items()}, found.converted)
        return found

    def read_submission(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Answers by id, or the evaluator's grades by id."""
        content = read_by_id(path)
        if not content:
            raise ScoreError(f"{path}: expected answers, or the evaluator's grades, by question id")
        return checked({key: _graded(value, path, key) for key, value in content.items()}, path, True)

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """Answers by id."""
        return {q.id: predictions.texts[q.id].strip() for q in questions}

    def _grades(self, questions: Sequence[Question], predictions: Predictions) -> list[float] | None:
        texts = [predictions.texts[q.id] for q in questions]
        if not predictions.converted or not any(text.startswith(_GRADE) for text in texts):
            return None
        without = [q.id for q, text in zip(questions, texts) if not text.startswith(_GRADE)]
        if without:
            raise ScoreError(f"{len(without)} questions have no grade: {name_some(without)}")
        return [float(text.removeprefix(_GRADE)) for text in texts]


def _graded(value: Any, path: Path, key: str) -> Any:
    """An answer as it stands; of the evaluator's grades, one for each of its runs, the mean as text."""
    if not isinstance(value, Mapping):
        return value
    runs = value.get("score")
    if not isinstance(runs, list) or not runs or not all(isinstance(run, int | float) for run in runs):
        raise ScoreError(f"{path}, question {key}: 'score' is {shown(runs)}, expected a list of grades")
    return f"{_GRADE}{sum(runs) / len(runs)}"


def _question(row: Row, identity: str, image: ImageSource | None, image_id: str) -> Question:
    capability = _capability(row)
    return Question(
        id=identity,
        image=image,
        text=row.text("question"),
        answer=row.text("answer", default=None),
        image_id=image_id,
        kind="_".join(sorted(capability)),
        details={"capability": capability},
    )


def _capability(row: Row) -> tuple[str, ...]:
    """The abilities that a question asks for; none are stated in LLaVA's file."""
    given = row.value("capability", "category")
    if given is None:
        return ()
    names = given.split(",") if isinstance(given, str) else row.texts("capability", "category")
    stripped = tuple((name or "").strip() for name in names)
    unknown = [name for name in stripped if name not in CAPABILITIES]
    if unknown:
        raise row.error(f"no ability of MM-Vet: {name_some(unknown)}; known: {', '.join(CAPABILITIES)}")
    return stripped

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

from dyvte.errors import DataError, ScoreError
from dyvte.tasks.base import Predictions, Question, name_some, percent, read_json, read_jsonl
from dyvte.tasks.common import NOT_GRADED, StandardBenchmark, ungraded
from dyvte.tasks.readers.files import ImageFolder, find_file, find_folder, need, table_rows

_GRADE = "grade:"


class MMVet(StandardBenchmark):
    """The 218 questions, graded elsewhere."""

    name = "mmvet"
    title = "MM-Vet"
    dialects = ("original",)
    suffix = ""
    submission_name = "mmvet_results.json"
    expected_tree = (
        "  <root>/                                 release (mm-vet.zip)\n"
        "    mm-vet.json\n"
        "    images/v1_0.png ...\n"
        "  or <root>/llava-mm-vet.jsonl beside images/ (LLaVA's playground/data/eval/mm-vet)\n"
        "  or <root>/data/test-*.parquet\n"
        "  or <root>/MMVet.tsv"
    )

    def sources(self):
        """The release, LLaVA's question file, tables."""
        return self._release, self._llava, self._table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "mm-vet.json", "mm-vet/mm-vet.json")
        if path is None:
            return None
        content = read_json(path, unique_keys=True)
        images = ImageFolder(find_folder(path.parent, "images"))
        questions = []
        for identity, entry in content.items():
            need(entry, ("imagename", "question", "answer", "capability"), path, identity)
            questions.append(
                _question(
                    identity, images[entry["imagename"]], entry["imagename"], entry, entry["capability"]
                )
            )
        return questions

    def _llava(self, root: Path) -> list[Question] | None:
        path = find_file(root, "llava-mm-vet.jsonl")
        if path is None:
            return None
        images = ImageFolder(find_folder(path, "images", "mm-vet/images"))
        questions = []
        for number, row in enumerate(read_jsonl(path), start=1):
            need(row, ("question_id", "image", "text"), path, number)
            entry = {"question": row["text"], "answer": None}
            image = images[row["image"]]
            questions.append(_question(f"v1_{row['question_id']}", image, row["image"], entry, []))
        return questions

    def _table(self, root: Path) -> list[Question] | None:
        rows = table_rows(root, ("MMVet.tsv", "*.tsv"), ("data/test-*.parquet", "*.parquet"))
        if rows is None:
            return None
        questions = []
        for number, row in enumerate(rows):
            need(row, ("image", "question"), root, number)
            own = str(row.get("question_id", row.get("index", number)))
            identity = own if own.startswith("v1_") else f"v1_{own}"
            abilities = row.get("capability") or row.get("category") or ""
            abilities = abilities.split(",") if isinstance(abilities, str) else abilities
            questions.append(_question(identity, row["image"], row["image"].name, row, abilities))
        return questions

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

    def headline(self, scores: Mapping[str, Any]) -> str:
        """The total with one decimal, where there are grades."""
        return f"{scores['accuracy']:.1f}" if scores.get("graded") else NOT_GRADED

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Also LLaVA's answers, whose ids lack the prefix ``v1_``."""
        found = super().read_predictions(path, questions)
        if found.texts and not any(key.startswith("v1_") for key in found.texts):
            return Predictions({f"v1_{key}": text for key, text in found.texts.items()}, found.converted)
        return found

    def read_submission(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Answers by id, or the evaluator's grades by id."""
        content = read_json(path, unique_keys=True)
        if not isinstance(content, dict) or not content:
            raise DataError(f"{path}: expected answers, or the evaluator's grades, by question id")
        texts = {}
        for key, value in content.items():
            if isinstance(value, Mapping):
                need(value, ("score",), path, key)
                runs = [float(score) for score in value["score"]]
                texts[key] = f"{_GRADE}{sum(runs) / len(runs)}"
            else:
                texts[key] = str(value)
        return Predictions(texts, converted=True)

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


def _question(
    identity: str, image: Any, image_id: str, entry: Mapping[str, Any], capability: Sequence[str]
) -> Question:
    return Question(
        id=str(identity),
        image=image,
        text=entry["question"],
        answer=entry.get("answer"),
        image_id=image_id,
        kind="_".join(sorted(one.strip() for one in capability)),
        details={"capability": tuple(one.strip() for one in capability)},
    )

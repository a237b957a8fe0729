"""Answers to a benchmark as files: what was predicted, and what the benchmark's own tool or server takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from dyvte.tasks.predictions import read_answers, read_json_table, read_submitted
from dyvte.tasks.records import Predictions, Question
from dyvte.tasks.writing import write_json


class Submissions:
    """What a benchmark reads and writes of answers; here the most common form, a list in one JSON file.

    Attributes
    ----------
    submission_name : str
        Of the file that its own tool or server takes.
    """

    submission_name: ClassVar[str] = "submission.json"

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Read raw answers (jsonl, or VLMEvalKit's table as TSV, workbook or JSON) or this benchmark's
        submission file (JSON).

        Parameters
        ----------
        path
            The file; its ending says what it is.
        questions
            Those that are answered, for files that name images instead.

        Raises
        ------
        ScoreError, DataError
            The file is not of these forms; it and the row are named.
        """
        path = Path(path)
        if path.suffix.lower() == ".json":
            return read_json_table(path) or self.read_submission(path, questions)
        return read_answers(path)

    def read_submission(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Read what :meth:`write_submission` writes: here a list of ``{"question_id", "answer"}``.

        Parameters
        ----------
        path
            Of the file.
        questions
            Those that are answered.
        """
        return read_submitted(path, "question_id", "answer", "prediction")

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write the file or folder that the benchmark's own tool or server takes.

        Parameters
        ----------
        folder
            Where it is written.
        questions, predictions
            In this order; each has a prediction.

        Returns
        -------
        Path
            What was written.
        """
        return write_json(Path(folder) / self.submission_name, self.submission(questions, predictions))

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """The content of the submission file.

        Parameters
        ----------
        questions
            As the benchmark gives them.
        predictions
            An answer to each.
        """
        return [{"question_id": q.id, "answer": predictions.texts[q.id].strip()} for q in questions]

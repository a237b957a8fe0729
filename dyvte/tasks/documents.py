"""What DocVQA and InfographicVQA share: files of the Robust Reading Competition, and ANLS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from dyvte.readers.files import ImageFolder, find_file, find_folder, table_image
from dyvte.readers.rows import Row, read_rows
from dyvte.tasks.answers.anls import anls
from dyvte.tasks.base import Benchmark, Predictions, Question
from dyvte.tasks.metrics import percent
from dyvte.tasks.predictions import read_submitted
from dyvte.tasks.records import ImageSource
from dyvte.tasks.writing import number_or_text


class DocumentBenchmark(Benchmark):
    """Short answers about a document; a subclass says how its files and fields are called.

    Attributes
    ----------
    release : tuple of str
        Patterns of the question file.
    image_folders : tuple of str
        Where the images of the release may lie.
    image_field : str
        Of a record of the release.
    type_fields : tuple of str
        Of a record: each holds a list of what kind of question it is, or such a list as text.
    """

    release: ClassVar[tuple[str, ...]] = ()
    image_folders: ClassVar[tuple[str, ...]] = ()
    image_field: ClassVar[str] = "image"
    type_fields: ClassVar[tuple[str, ...]] = ()

    max_new_tokens: ClassVar[int] = 32
    score_name: ClassVar[str] = "ANLS, %"
    headline_metrics: ClassVar[tuple[str, ...]] = ("anls",)

    def sources(self):
        """The release, tables."""
        return self._release, self.table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, *self.release)
        if path is None:
            return None
        images = ImageFolder(find_folder(path, *self.image_folders), ("", ".png", ".jpg", ".jpeg"))
        questions = []
        for row in read_rows(path, "data"):
            # the release writes "documents/x.png" and unpacks to other folders as well
            name = row.text(self.image_field)
            bare = name.rsplit("/", 1)[-1]
            questions.append(self._question(row, row.identity("questionId"), images.of(row, bare), bare))
        return questions

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """Parquet lists the answers, the TSV holds the text of the list."""
        identity = row.identity("questionId", "question_id", "index", default=str(number))
        page = [row.identity(key, default="") for key in ("ucsf_document_id", "ucsf_document_page_no")]
        named = "_".join(page) if all(page) else row.identity("image_url", "image_path", default="")
        image, name = table_image(row, base, identity)
        return self._question(row, identity, image, named or name)

    def _question(self, row: Row, identity: str, image: ImageSource | None, image_id: str) -> Question:
        given = row.several("answers", "answer") if row.value("answers", "answer") is not None else []
        answers = tuple(answer for answer in given if answer is not None)
        stated = (field for field in self.type_fields if row.value(field) is not None)
        kinds = [kind for field in stated for kind in row.several(field) if kind]
        return Question(
            id=identity,
            image=image,
            text=row.text("question"),
            answer=answers[0] if answers else None,
            image_id=image_id,
            kind=kinds[0] if kinds else "",
            details={"answers": answers, "kinds": tuple(kinds)},
        )

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[float]:
        """ANLS in [0, 1]. VLMEvalKit and a submission are read as they stand, else outer blanks are off."""
        as_it_stands = dialect == "vlmevalkit" or predictions.converted
        texts = [predictions.texts[q.id] for q in questions]
        return [
            anls(text if as_it_stands else text.strip(), q.details["answers"])
            for q, text in zip(questions, texts, strict=True)
        ]

    def metrics(
        self, questions: Sequence[Question], hits: Sequence[float], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """ANLS in percent, also by type: a question of several types is counted in each."""
        by_kind: dict[str, list[float]] = {}
        for q, hit in zip(questions, hits, strict=True):
            for kind in dict.fromkeys(q.details["kinds"]):
                by_kind.setdefault(kind, []).append(hit)
        per_kind = {kind: {"anls": percent(own), "num_questions": len(own)} for kind, own in by_kind.items()}
        return {"anls": percent(hits), "per_kind": per_kind}

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """What the server of the Robust Reading Competition takes."""
        return [
            {"questionId": number_or_text(q.id), "answer": predictions.texts[q.id].strip()} for q in questions
        ]

    def read_submission(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Rows of ``{"questionId", "answer"}``."""
        return read_submitted(path, "questionId", "answer")

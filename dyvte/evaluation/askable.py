"""Which of a benchmark's questions can be asked of a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dyvte.data import Defect
from dyvte.data.defects import Unusable
from dyvte.evaluation.checks import defects_alone, image_defects, refuse, text_defects, without_units
from dyvte.evaluation.generation import Pipeline, encode_together
from dyvte.progress import progress
from dyvte.tasks.base import Question


def unaskable(
    pipeline: Pipeline,
    questions: Sequence[Question],
    prompts: Sequence[str],
    where: str,
    max_bad_samples: int = 0,
) -> dict[str, str]:
    """The questions that cannot be asked: id to what is wrong.

    Texts are rendered and tokenised, images decoded. What only the image processor or a video's decoder
    refuses is found here where something is tolerated, at the cost of reading every image twice; else it
    ends the run, named, when its batch comes.

    Parameters
    ----------
    pipeline
        The backbone and how it is asked.
    questions, prompts
        What is asked about, and how.
    where
        The benchmark and its files, for messages.
    max_bad_samples
        How many are tolerated.

    Raises
    ------
    DataError
        If there are more; the first are named.
    """
    found = text_defects(pipeline.processor, pipeline.template, questions, prompts, where)
    refuse(found, len(questions), where, max_bad_samples)
    bad = {defect.sample_id for defect in found}
    rest = [(one, prompt) for one, prompt in zip(questions, prompts, strict=True) if one.id not in bad]
    if max_bad_samples:
        found += _encoding_defects(pipeline, rest, where)
    else:
        found += image_defects([one for one, _ in rest], where)
    refuse(found, len(questions), where, max_bad_samples)
    return {defect.sample_id: f"{defect.field}: {defect.problem}" for defect in found}


def without_unaskable(
    pipeline: Pipeline,
    questions: Sequence[Question],
    prompts: Sequence[str],
    where: str,
    max_bad_samples: int,
) -> tuple[list[Question], dict[str, str]]:
    """For studies, which compare answers on the same questions: those that remain when the questions that
    cannot be asked, and all others about their images, are excluded; and `unaskable`, whose parameters and
    errors these are. Where nothing is tolerated, nothing is looked at yet."""
    if not max_bad_samples:
        return list(questions), {}
    problems = unaskable(pipeline, questions, prompts, where, max_bad_samples)
    return without_units(questions, problems), problems


def _encoding_defects(pipeline: Pipeline, asked: Sequence[tuple[Question, str]], where: str) -> list[Defect]:
    """Encode a question about each image or video; those that fail, of each question about it."""
    about: dict[object, list[Question]] = {}
    first: list[tuple[Question, str]] = []
    for question, prompt in asked:
        same = about.setdefault((question.images, question.video), [])
        if not same:
            first.append((question, prompt))
        same.append(question)
    with progress(len(first), "images", "image", delay=5) as advance:

        def encode_alone(index: int) -> None:
            question, prompt = first[index]
            if not question.images and question.video is None:
                raise Unusable("image", "the question has none")
            try:
                encode_together(pipeline, [question], [prompt])
            finally:
                advance(1)

        found = defects_alone([question.id for question, _ in first], encode_alone, where)
    by_id = {question.id: about[question.images, question.video] for question, _ in first}
    return [replace(defect, sample_id=one.id) for defect in found for one in by_id[defect.sample_id]]

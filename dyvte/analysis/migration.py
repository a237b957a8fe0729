"""VTW Table 1: has what the image says reached the text by layer K?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.analysis.findings import Findings
from dyvte.analysis.outcomes import (
    outcome_of,
    outcome_table,
    outcomes_of,
    paint_outcomes,
    without_images,
)
from dyvte.analysis.subject import Subject
from dyvte.errors import ConfigError
from dyvte.evaluation.generation import answer, encode_questions, plan_batches, question_images
from dyvte.evaluation.run_log import Answer
from dyvte.evaluation.scores import FULL_MODEL
from dyvte.progress import progress
from dyvte.runtime import VisualExit
from dyvte.tasks.base import Question

DEFINITION = (
    "(a) the question alone, no image in the prompt; (b) a blank image of the same size in the layers "
    "1..K, no visual token behind them; (c) the real image in the layers 1..K, no visual token behind "
    'them: VTW. What a "non-content image" is the paper does not say; ours has one colour, the '
    "processor's mean (black where it has none)."
)


def study(subject: Subject) -> Findings:
    """Score the full model and the three settings."""
    layer = subject.layer
    fixed = subject.policies(f"fixed:{layer}")
    real = subject.ask(fixed)
    blank_questions = blanked(subject.questions, subject)
    blank = subject.ask(fixed, blank_questions, "runs-blank")
    full, name = real[FULL_MODEL], fixed[0].name
    blanked_run = blank[name]
    outcomes = [
        *outcomes_of(subject, real, {FULL_MODEL: "full model"}),
        outcome_of(subject, "(a) without image", blind_answers(subject), full),
        outcome_of(
            subject,
            f"(b) blank image in layers 1..{layer}",
            blanked_run.answers,
            full,
            blanked_run.scores.cost,
        ),
        *outcomes_of(subject, real, {name: f"(c) real image in layers 1..{layer}"}),
    ]
    rows = dict(zip(("full", "without_image", "blank_image", "real_image"), outcomes, strict=True))
    return Findings(
        title=f"Information migration, K = {layer} of {subject.num_layers}",
        definition=DEFINITION,
        metrics={"layer": layer, **{key: one.to_dict() for key, one in rows.items()}},
        table=outcome_table(subject, outcomes),
        paint=paint_outcomes(outcomes),
        size=(6.4, 2.6),
    )


def blind_answers(subject: Subject) -> list[Answer]:
    """Answers to the questions alone, in their order."""
    questions = without_images(subject.questions)
    prompts = subject.prompts(questions)
    answers: dict[str, Answer] = {}
    with progress(len(questions), "without image", "answer") as advance:
        for rows in plan_batches(subject.pipeline, prompts, subject.config.batch_size):
            chosen = [questions[row] for row in rows]
            batch = encode_questions(subject.pipeline, chosen, [prompts[row] for row in rows])
            answers.update((one.question_id, one) for one in answer(subject.pipeline, batch, VisualExit()))
            advance(len(rows))
    return [answers[question.id] for question in questions]


def blanked(questions: Sequence[Question], subject: Subject) -> list[Question]:
    """The same questions, each image replaced by a blank one of its size (kept below ``output/blank``).

    Parameters
    ----------
    questions
        About images.
    subject
        Whose processor says the mean colour, and whose output folder keeps the blanks.

    Raises
    ------
    ConfigError
        For questions about a video.
    """
    if any(question.video is not None for question in questions):
        raise ConfigError("blank images stand in for images only; this benchmark asks about videos")
    color = _mean_color(subject.pipeline.processor)
    return [_blanked(question, subject, color) for question in questions]


def _blanked(question: Question, subject: Subject, color: tuple[int, int, int]) -> Question:
    sizes = [image.size for image in question_images(question, subject.pipeline.num_frames)]
    images = tuple(_blank(subject.config.output / "blank", size, color) for size in sizes)
    return dataclasses.replace(question, image=images[0], more_images=images[1:])


def _blank(folder: Path, size: tuple[int, int], color: tuple[int, int, int]) -> Path:
    from PIL import Image

    path = folder / "{}x{}-{}-{}-{}.png".format(*size, *color)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(path)
    return path


def _mean_color(processor: Any) -> tuple[int, int, int]:
    mean = getattr(getattr(processor, "image_processor", None), "image_mean", None)
    if mean is None or len(mean) != 3:
        return 0, 0, 0
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue

"""What is put to the backbone: the questions of a run, batch by batch, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from dyvte.backbones.sizes import decoder_shape
from dyvte.distributed import Processes
from dyvte.evaluation.generation import Batch, Pipeline, answer, encoded_batches
from dyvte.evaluation.run_log import Answer, AnswerLog
from dyvte.evaluation.settings import NamedPolicy
from dyvte.progress import Advance, progress
from dyvte.runtime import VisualExit
from dyvte.tasks.base import Question


@dataclass(frozen=True)
class Asking:
    """Questions, their prompts, the batches as indices of questions, and why some questions cannot be asked,
    by id."""

    pipeline: Pipeline
    questions: Sequence[Question]
    prompts: Sequence[str]
    plan: Sequence[Sequence[int]]
    problems: Mapping[str, str]

    def batches(self, wanted: Sequence[int]) -> Iterator[Batch]:
        """The wanted ones, encoded, of the questions that can be asked.

        Parameters
        ----------
        wanted
            Indices of batches.
        """
        return encoded_batches(
            self.pipeline, self.questions, self.prompts, self.plan, wanted, self.problems.keys()
        )

    def answers(self, batch: Batch, exits: VisualExit) -> list[Answer]:
        """To all questions of a batch; empty ones to those that cannot be asked.

        Parameters
        ----------
        batch
            From `batches`.
        exits
            The policy and its reductions.
        """
        by_id = {one.question_id: one for one in self.asked(batch, exits)}
        ids = [self.questions[i].id for i in self.plan[batch.index]]
        return [by_id.get(question_id) or self.unanswered(question_id) for question_id in ids]

    def asked(self, batch: Batch, exits: VisualExit) -> list[Answer]:
        """To the questions that the batch holds.

        Parameters
        ----------
        batch
            Encoded.
        exits
            The policy and its reductions.
        """
        return answer(self.pipeline, batch, exits) if batch.question_ids else []

    def unanswered(self, question_id: str) -> Answer:
        """In place of the answer to a question that cannot be asked.

        Parameters
        ----------
        question_id
            Of the question.
        """
        num_layers = decoder_shape(self.pipeline.model.config).num_layers
        return Answer.unanswered(question_id, self.problems[question_id], num_layers)


def ask_missing(
    asking: Asking,
    policies: Sequence[NamedPolicy],
    logs: Sequence[AnswerLog],
    description: str,
    processes: Processes,
) -> None:
    """Ask this process's share of what is missing; the policies take turns on each encoded batch.

    Parameters
    ----------
    asking
        What is put to the backbone.
    policies
        With their reductions.
    logs
        Of each.
    description
        Of the progress bar.
    processes
        That share the batches.
    """
    missing = [set(log.missing()) for log in logs]
    wanted = processes.share(sorted(set().union(*missing)))
    total = sum(len(asking.plan[index]) for index in wanted for one in missing if index in one)
    exits = [named.exits() for named in policies]
    with progress_of(total, description, processes) as advance:
        for batch in asking.batches(wanted):
            for one, log, still in zip(exits, logs, missing, strict=True):
                if batch.index in still:
                    log.append(batch.index, asking.answers(batch, one))
                    advance(len(asking.plan[batch.index]))


def progress_of(total: int, description: str, processes: Processes) -> AbstractContextManager[Advance]:
    """Shown by the first process, of its own share.

    Parameters
    ----------
    total
        Answers of this process.
    description
        What is asked.
    processes
        That share them.
    """
    if processes.world_size > 1:
        description = f"{description} (1 of {processes.world_size} processes)"
    return progress(total, description, "answer", shown=total > 0 and processes.first)

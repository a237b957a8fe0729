"""Schedules that are known beforehand: each question is asked once at each, whoever wants the answer.

An answer depends on the question and its schedule alone. Rules that are compared often give a question the
same schedule, and then they have the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from dyvte.distributed import Processes
from dyvte.evaluation.asking import Asking, progress_of
from dyvte.evaluation.generation import Batch, encoded_batches
from dyvte.evaluation.run_log import Answer, AnswerLog
from dyvte.evaluation.settings import NamedPolicy
from dyvte.policies import OraclePolicy
from dyvte.runtime import VisualExit

Asked: TypeAlias = tuple[str, int, int]
"""Question id, freeze layer, exit layer; equal layers where visual tokens leave without being frozen."""


def is_given(named: NamedPolicy) -> bool:
    """Does the policy say each question's schedule by its id, and spend nothing less besides?

    Parameters
    ----------
    named
        The policy with its reductions.
    """
    policy = named.policy
    by_id = isinstance(policy, OraclePolicy) and isinstance(policy.exit_layers, Mapping)
    return by_id and not named.reductions and not named.options


def known_answers(answers: Iterable[Answer]) -> dict[Asked, Answer]:
    """Answers by what was asked; none of a question without an image, or that could not be asked.

    Parameters
    ----------
    answers
        Of policies without reductions.
    """
    return {
        (one.question_id, one.updated_layers, one.exit_layer): one
        for one in answers
        if one.exit_layer >= 0 and not one.problem
    }


def ask_given(
    asking: Asking,
    policies: Sequence[NamedPolicy],
    logs: Sequence[AnswerLog],
    known: Mapping[Asked, Answer],
    description: str,
    processes: Processes,
) -> None:
    """Ask this process's share of what is missing, each question once at each of its schedules.

    Parameters
    ----------
    asking
        What is put to the backbone.
    policies
        All of them `is_given`.
    logs
        Of each.
    known
        Answers that need not be asked for.
    description
        Of the progress bar.
    processes
        That share the batches.
    """
    missing = [set(log.missing()) for log in logs]
    wanted = processes.share(sorted(set().union(*missing)))
    rules = [_schedules(named.policy) for named in policies]
    found = dict(known)
    rows: list[tuple[int, Asked]] = []
    plan: list[list[int]] = []
    parts: dict[int, range] = {}  # of each batch: those of the plan that answer it
    size = max(map(len, asking.plan))
    for index in wanted:
        first = len(plan)
        # Of all rules, whatever is missing: a run that goes on forms the same batches.
        own = list(dict.fromkeys(_new(asking, index, rules, found)))
        numbers = range(len(rows), len(rows) + len(own))
        rows += own
        plan += [list(numbers[start : start + size]) for start in range(0, len(own), size)]
        parts[index] = range(first, len(plan))
    # One question stands in a batch once for each schedule, under names of their own.
    names = [f"{question_id} {f} {k}" for _, (question_id, f, k) in rows]
    questions = [replace(asking.questions[i], id=name) for (i, _), name in zip(rows, names, strict=True)]
    prompts = [asking.prompts[i] for i, _ in rows]
    exits = VisualExit.from_policy(
        OraclePolicy(
            {name: k for name, (_, (_, _, k)) in zip(names, rows, strict=True)},
            {name: f for name, (_, (_, f, _)) in zip(names, rows, strict=True)},
        )
    )
    batches = encoded_batches(asking.pipeline, questions, prompts, plan, range(len(plan)))
    with progress_of(len(rows), description, processes) as advance:
        for index in wanted:
            for batch in _next(batches, len(parts[index])):
                numbers = plan[batch.index]
                for number, given in zip(numbers, asking.asked(batch, exits), strict=True):
                    found[rows[number][1]] = given
                advance(len(numbers))
            for rule, log, still in zip(rules, logs, missing, strict=True):
                if index in still:
                    log.append(index, [_of(asking, i, rule, found) for i in asking.plan[index]])


def _schedules(policy: OraclePolicy) -> dict[str, tuple[int, int]]:
    freezes = policy.exit_layers if policy.freeze_layers is None else policy.freeze_layers
    return {question_id: (min(freezes[question_id], k), k) for question_id, k in policy.exit_layers.items()}


def _new(
    asking: Asking,
    index: int,
    rules: Sequence[Mapping[str, tuple[int, int]]],
    found: Mapping[Asked, Answer],
) -> Iterator[tuple[int, Asked]]:
    """What must be asked for a batch, a question's schedules one after the other."""
    for i in asking.plan[index]:
        question_id = asking.questions[i].id
        if question_id in asking.problems:
            continue
        for rule in rules:
            asked = (question_id, *rule[question_id])
            if asked not in found:
                yield i, asked


def _next(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    for _ in range(count):
        yield next(batches)


def _of(asking: Asking, i: int, rule: Mapping[str, tuple[int, int]], found: Mapping[Asked, Answer]) -> Answer:
    question_id = asking.questions[i].id
    if question_id in asking.problems:
        return asking.unanswered(question_id)
    one = found[(question_id, *rule[question_id])]
    return replace(one, question_id=question_id, gate_logits=(), freeze_logits=())

"""What the answer would be, had the image left after any layer: one trace, and the answers that differ.

The trace knows at which exits the whole greedy answer is the full model's (`dyvte.trace_exits`); only the
others are generated, all at once. With the gates' chances at every layer, any threshold's answer follows
without asking the model again.

Shapes: L decoder layers.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from dyvte.calibration.operating_points import gate_logits
from dyvte.costs.memory import kv_bytes
from dyvte.gates import DEFAULT_FEATURES
from dyvte.policies import FixedPolicy
from dyvte.serving.answerer import Answerer
from dyvte.serving.asking import Collected
from dyvte.serving.errors import RequestError
from dyvte.serving.groups import RowGroup
from dyvte.serving.jobs import Conversation, Decoding, Job
from dyvte.serving.schedules import ServedSchedule
from dyvte.teacher import trace_exits
from dyvte.teacher.labels import greedy_answers

MAX_TOKENS = 256
"""Longest answer that is looked into."""


@dataclass(frozen=True)
class ExitAnswers:
    """The answers of all exit layers.

    Attributes
    ----------
    num_layers
        L.
    prompt_tokens, visual_tokens
        Of the prompt.
    answers
        (L+1,) entry k: the greedy answer with the image gone after layer k.
    risks
        (L+1,) KL(full || exit at k) in nats, mean over the full answer's tokens.
    first_stable
        Smallest k from which on every answer is the full model's.
    gate_probabilities
        (L-1,) chance of leaving after layers 1..L-1, None where a gate's output is not finite; None as a
        whole without gates, or where they also freeze.
    visual_compute
        (L+1,) share of the full model's work on visual tokens.
    kv_bytes
        (L+1,) bytes of the prompt's keys and values.
    generated
        Answers that had to be generated beside the full one.
    seconds
        What all of it took.
    """

    num_layers: int
    prompt_tokens: int
    visual_tokens: int
    answers: tuple[str, ...]
    risks: tuple[float, ...]
    first_stable: int
    gate_probabilities: tuple[float | None, ...] | None
    visual_compute: tuple[float, ...]
    kv_bytes: tuple[int, ...]
    generated: int
    seconds: float


@torch.inference_mode()
def exit_answers(
    answerer: Answerer, conversation: Conversation, max_tokens: int | None = None
) -> ExitAnswers:
    """Answers, risks and costs of every exit layer for one question.

    Parameters
    ----------
    max_tokens
        Of an answer; None: `MAX_TOKENS`, or what the context holds.

    Raises
    ------
    RequestError
        If there is no image, the prompt does not fit, or reductions are in force: the trace is of the model
        without any.
    """
    begun, limit = time.perf_counter(), min(max_tokens or MAX_TOKENS, MAX_TOKENS)
    if not any(conversation.images):
        raise RequestError("messages: there is no image that could leave", param="messages", code="no_image")
    if answerer.reductions:
        raise RequestError(
            "this server runs with a reduction: answers at exits are not traced", code="unsupported"
        )
    model, num_layers = answerer.pipeline.model, answerer.shape.num_layers
    collected = [Collected() for _ in range(num_layers + 1)]
    jobs = [_job(answerer, conversation, k, limit, collected[k]) for k in range(num_layers + 1)]
    batch = answerer.encode(jobs[:1])
    num_prompt = int(batch.num_tokens_B[0])
    answerer.room(num_prompt, Decoding(max_tokens=limit))
    grown, answer_BN = greedy_answers(model, batch.inputs, limit)
    gates = None if answerer.menu.gates is None else answerer.menu.gates.gates
    features = DEFAULT_FEATURES if gates is None else gates.config.features
    trace = trace_exits(model, grown, answer_BN, features=features)
    tokens = grown["input_ids"][answer_BN].tolist()
    full = answerer.pipeline.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    other = [k for k in range(num_layers) if not bool(trace.same_answer[0, k])]
    if other:
        group = RowGroup(answerer, [jobs[k] for k in other])
        while not group.is_over:
            group.go_on()
    answers = tuple(collected[k].answer().texts[0] if k in other else full for k in range(num_layers + 1))
    different = [k for k, answer in enumerate(answers) if answer != full]
    num_visual = int(trace.num_visual[0])
    chances = None
    if gates is not None and not gates.config.freeze_head:
        logits_L = gate_logits(gates, trace)[0, : num_layers - 1]
        chances = tuple(
            chance if math.isfinite(chance) else None for chance in logits_L.double().sigmoid().tolist()
        )
    layers = range(num_layers + 1)
    bytes_K = kv_bytes(
        answerer.shape,
        [num_prompt - num_visual] * len(layers),
        [num_visual] * len(layers),
        list(layers),
        bytes_per_value=model.dtype.itemsize,
    )
    return ExitAnswers(
        num_layers=num_layers,
        prompt_tokens=num_prompt,
        visual_tokens=num_visual,
        answers=answers,
        risks=tuple(trace.risk[0].double().tolist()),
        first_stable=max(different, default=-1) + 1,
        gate_probabilities=chances,
        visual_compute=tuple(k / num_layers for k in layers),
        kv_bytes=tuple(int(number) for number in bytes_K.tolist()),
        generated=len(other),
        seconds=time.perf_counter() - begun,
    )


def _job(answerer: Answerer, conversation: Conversation, k: int, limit: int, into: Collected) -> Job:
    return answerer.job(
        conversation,
        id=f"exit {k}",
        emit=into.add,
        schedule=ServedSchedule(FixedPolicy(k), f"fixed:{k}"),
        decoding=Decoding(max_tokens=limit),
    )

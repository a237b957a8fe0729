"""What the answer would be under any schedule: one trace, and the answers that differ.

The trace knows under which schedules the whole greedy answer is the full model's (`dyvte.trace_exits`); only
the others are generated, all at once. With the gates' logits at every layer it also knows where any threshold
lets the visual tokens freeze and leave, so a threshold can be moved without asking the model again.

Shapes: L decoder layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.calibration.operating_points import gate_logits
from dyvte.calibration.path import ThresholdPath, at_schedule
from dyvte.costs.memory import kv_bytes
from dyvte.costs.visual import visual_compute
from dyvte.errors import CalibrationError
from dyvte.gates import DEFAULT_FEATURES, GateStack, HeadLogits, Schedules
from dyvte.policies import FixedPolicy, FreezePolicy
from dyvte.serving.answerer import Answerer
from dyvte.serving.asking import Collected
from dyvte.serving.errors import RequestError
from dyvte.serving.groups import RowGroup
from dyvte.serving.jobs import Conversation, Decoding
from dyvte.serving.schedules import ServedSchedule
from dyvte.teacher import Trace, trace_exits
from dyvte.teacher.labels import greedy_answers

MAX_TOKENS = 256
"""Longest answer that is looked into."""


@dataclass(frozen=True)
class TracedSchedule:
    """What is known of one schedule.

    Attributes
    ----------
    freeze_layer, exit_layer
        f and k.
    answer
        The greedy answer.
    is_full
        Is it the full model's?
    risk
        KL(full || this) in nats, mean over the full answer's tokens.
    visual_compute, kv_bytes
        Share of the full model's work on visual tokens; bytes of the prompt's keys and values.
    """

    freeze_layer: int
    exit_layer: int
    answer: str
    is_full: bool
    risk: float
    visual_compute: float
    kv_bytes: int


@dataclass(frozen=True)
class PathStep:
    """Where the gates' decision changes as the threshold rises.

    Attributes
    ----------
    level
        The exit threshold's logit from which on the schedule holds, up to the next step's; None: from minus
        infinity.
    schedule
        Index into `SchedulesTraced.schedules`.
    exit_logits
        (L-1,) what the exit gates say to a row that froze so.
    """

    level: float | None
    schedule: int
    exit_logits: tuple[float, ...]


@dataclass(frozen=True)
class SchedulesTraced:
    """One question under every schedule that matters.

    Attributes
    ----------
    num_layers
        L.
    prompt_tokens, visual_tokens
        Of the prompt.
    schedules
        The plain exits 0..L first (entry k leaves after layer k), then others on the gates' path.
    first_stable
        Smallest exit from which on every answer is the full model's.
    path
        The gates' decisions at every threshold; empty without gates, or where one of their outputs is not
        finite.
    freeze_logits
        (L,) what the freeze head says after layer j, 0 before the first; empty without one.
    freeze_gap
        Level of the freeze threshold minus that of the exit threshold.
    generated
        Answers that had to be generated beside the full one.
    seconds
        What all of it took.
    """

    num_layers: int
    prompt_tokens: int
    visual_tokens: int
    schedules: tuple[TracedSchedule, ...]
    first_stable: int
    path: tuple[PathStep, ...]
    freeze_logits: tuple[float, ...]
    freeze_gap: float
    generated: int
    seconds: float


@torch.inference_mode()
def trace_schedules(
    answerer: Answerer, conversation: Conversation, max_tokens: int | None = None
) -> SchedulesTraced:
    """Answers, risks and costs of all exits, and of all schedules that the gates can choose, for a question.

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
    begun = time.perf_counter()
    if not any(conversation.images):
        raise RequestError("messages: there is no image that could leave", param="messages", code="no_image")
    if answerer.reductions:
        text = "this server runs with a reduction: other schedules are not traced"
        raise RequestError(text, code="unsupported")
    gates = None if answerer.menu.gates is None else answerer.menu.gates.gates
    batch = answerer.encode([answerer.job(conversation, id="trace", emit=print)])
    num_prompt = int(batch.num_tokens_B[0])
    limit = min(MAX_TOKENS, answerer.room(num_prompt, Decoding(max_tokens=max_tokens)))
    grown, answer_BN = greedy_answers(answerer.pipeline.model, batch.inputs, limit)
    trace = trace_exits(
        answerer.pipeline.model,
        grown,
        answer_BN,
        freezes=() if gates is None else gates.config.open_freezes,
        features=DEFAULT_FEATURES if gates is None else gates.config.features,
    )
    path, steps = _path(gates, trace)
    exits = [(k, k) for k in range(trace.num_layers + 1)]
    chosen = [*exits, *dict.fromkeys(pair for _, pair in steps if pair not in exits)]
    tokens = grown["input_ids"][answer_BN].tolist()
    full = answerer.pipeline.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    same, risks = (_of_trace(trace, name, chosen) for name in ("same_answer", "risk"))
    other = [pair for pair, is_same in zip(chosen, same) if not is_same]
    texts = {**dict.fromkeys(chosen, full), **_generated(answerer, conversation, other, limit)}
    num_visual = int(trace.num_visual[0])
    schedules = tuple(
        TracedSchedule(
            *pair, texts[pair], texts[pair] == full, risk, *_costs(answerer, pair, num_prompt, num_visual)
        )
        for pair, risk in zip(chosen, risks)
    )
    differs = [one.exit_layer for one in schedules[: len(exits)] if not one.is_full]
    two_heads = path is not None and isinstance(path.logits, HeadLogits)
    return SchedulesTraced(
        num_layers=trace.num_layers,
        prompt_tokens=num_prompt,
        visual_tokens=num_visual,
        schedules=schedules,
        first_stable=max(differs, default=-1) + 1,
        path=tuple(PathStep(level, chosen.index(pair), _exit_logits(path, pair[0])) for level, pair in steps),
        freeze_logits=tuple(path.logits.freeze_BL[0].tolist()) if two_heads else (),
        freeze_gap=path.gap if two_heads else 0.0,
        generated=len(other),
        seconds=time.perf_counter() - begun,
    )


def _path(
    gates: GateStack | None, trace: Trace
) -> tuple[ThresholdPath | None, list[tuple[float | None, tuple[int, int]]]]:
    """The gates' path on one traced sample, and the schedule from each level on."""
    if gates is None:
        return None, []
    path = ThresholdPath.of(gate_logits(gates, trace), trace, gates.config)
    try:
        levels = path.levels().tolist()
    except CalibrationError:  # an output that is not finite: what follows is the runtime's to say
        return None, []
    # A gate fires strictly above the threshold: from its own logit on it does not.
    ends = [*levels[1:], levels[-1] + 2.0]
    places = [(None, levels[0] - 1.0), *((low, (low + high) / 2) for low, high in zip(levels, ends))]
    steps: list[tuple[float | None, tuple[int, int]]] = []
    for level, inside in places:
        at = path.at(inside)
        pair = (int(at.freeze_layers_B[0]), int(at.exit_layers_B[0]))
        if not steps or steps[-1][1] != pair:
            steps.append((level, pair))
    return path, steps


def _exit_logits(path: ThresholdPath, freeze: int) -> tuple[float, ...]:
    """Exit logits of layers 1..L-1 on the stream of a row that froze after this layer."""
    logits = path.logits
    if isinstance(logits, HeadLogits):
        stream = logits.freeze_layers.index(freeze) if freeze in logits.freeze_layers else -1
        plain_L, own_L = logits.exit_BGL[0, -1].tolist(), logits.exit_BGL[0, stream].tolist()
        return tuple([*plain_L[:freeze], *own_L[freeze:]][: logits.num_layers - 1])
    return tuple(logits[0, :-1].tolist())


def _of_trace(trace: Trace, name: str, pairs: Sequence[tuple[int, int]]) -> list[float]:
    """A measure of the traced sample under several schedules."""
    freezes_P, exits_P = torch.tensor(pairs).unbind(1)
    values = trace.labels(name).expand(len(pairs), -1, -1)
    return at_schedule(values.cpu(), trace.freezes, Schedules(freezes_P, exits_P)).double().tolist()


def _generated(
    answerer: Answerer, conversation: Conversation, pairs: Iterable[tuple[int, int]], limit: int
) -> dict[tuple[int, int], str]:
    """The answers under some schedules, generated together."""
    collected = {pair: Collected() for pair in pairs}
    jobs = []
    for (f, k), into in collected.items():
        policy = FixedPolicy(k) if f == k else FreezePolicy(f, k)
        schedule = ServedSchedule(policy, f"freeze:{f}:{k}")
        decoding = Decoding(max_tokens=limit)
        jobs.append(
            answerer.job(conversation, id=schedule.text, emit=into.add, schedule=schedule, decoding=decoding)
        )
    if jobs:
        group = RowGroup(answerer, jobs)
        while not group.is_over:
            group.go_on()
    return {pair: into.answer().texts[0] for pair, into in collected.items()}


def _costs(answerer: Answerer, pair: tuple[int, int], num_prompt: int, num_visual: int) -> tuple[float, int]:
    """Visual compute and KV bytes of a schedule."""
    freeze_1, exit_1, visual_1 = (torch.tensor([number]) for number in (*pair, num_visual))
    shape = answerer.shape
    share = visual_compute(exit_1, visual_1, shape.num_layers, freeze_1, shape)
    held: Tensor = kv_bytes(
        shape,
        [num_prompt - num_visual],
        [num_visual],
        [pair[1]],
        bytes_per_value=answerer.pipeline.model.dtype.itemsize,
    )
    return share if math.isfinite(share) else 0.0, int(held[0])

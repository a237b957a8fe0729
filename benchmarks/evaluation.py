"""Batched evaluation against the reference loader's way, on the same processor, model and questions.

The reference (LLaVA's model_vqa_loader with DyVTE's model file) asks one question at a time and has attention
weights returned in every layer of every step, which only the eager attention gives. ``dyvte eval`` asks
batches through SDPA and reads the next batch meanwhile. Each round has questions of its own, and asks them in
every way. Processor seconds are printed too: they say what is left when more cores do not help. The answers
must be the same; a changed one ends the script with an error.

    python benchmarks/evaluation.py                      # embedded backbone, mini-GQA: 320 questions
    python benchmarks/evaluation.py --questions 48 --rounds 2 --batch 16                     # its small form
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import Report, Times, arguments, interleaved, ratio, setting_of

from dyvte.backbones import generate_greedily, get_template, load_backbone
from dyvte.evaluation.generation import (
    Pipeline,
    answer,
    encode_questions,
    encoded_batches,
    plan_batches,
)
from dyvte.evaluation.runner import prompts_of
from dyvte.evaluation.settings import NamedPolicy, parse_named
from dyvte.tasks.base import Question, get_benchmark

ROOT = Path(__file__).resolve().parents[1]
Answers = dict[str, str]


@torch.inference_mode()
def reference_way(questions: Sequence[Question], prompts: Sequence[str], pipeline: Pipeline) -> Answers:
    """One question at a time, attention weights of all layers and steps returned."""
    found = {}
    for question, prompt in zip(questions, prompts, strict=True):
        inputs = encode_questions(pipeline, [question], [prompt]).inputs
        given = generate_greedily(
            pipeline.model,
            inputs,
            pipeline.max_new_tokens,
            output_attentions=True,
            return_dict_in_generate=True,
        )
        new = given.sequences[:, inputs["input_ids"].shape[1] :]
        found[question.id] = pipeline.processor.tokenizer.batch_decode(new, skip_special_tokens=True)[0]
    return found


def batched_way(
    questions: Sequence[Question],
    prompts: Sequence[str],
    pipeline: Pipeline,
    named: NamedPolicy,
    batch_size: int,
) -> Answers:
    """As ``dyvte eval`` asks."""
    plan = plan_batches(pipeline, prompts, batch_size)
    batches = encoded_batches(pipeline, questions, prompts, plan, range(len(plan)))
    given = (one for batch in batches for one in answer(pipeline, batch, named.exits()))
    return {one.question_id: one.prediction for one in given}


class Way:
    """One way to ask, each round on the next part of the questions; notes answers and processor seconds."""

    def __init__(
        self, parts: Sequence[Sequence[tuple[Question, str]]], ask: Callable[..., Answers], *more: object
    ) -> None:
        self.parts, self.ask, self.more = parts, ask, more
        self.answers: Answers = {}
        self.processor: list[float] = []

    def seconds(self) -> float:
        """Of one question."""
        part = self.parts[len(self.processor) % len(self.parts)]
        questions, prompts = zip(*part, strict=True)
        start, start_processor = time.perf_counter(), time.process_time()
        self.answers.update(self.ask(questions, prompts, *self.more))
        self.processor.append((time.process_time() - start_processor) / len(part))
        return (time.perf_counter() - start) / len(part)


def load(args: argparse.Namespace, attention: str) -> Pipeline:
    """The backbone with one attention function."""
    model, processor = load_backbone(
        args.model, dtype=args.dtype, device=args.device, attn_implementation=attention
    )
    return Pipeline(model, processor, get_template("auto", processor), args.max_new_tokens)


def main() -> None:
    parser = arguments(__doc__, batch=64)
    parser.set_defaults(rounds=5)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "tiny-llava"))
    parser.add_argument("--benchmark", default="gqa")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "scenes" / "mini_gqa")
    parser.add_argument("--question-suffix", default="", help="the embedded backbone knows none")
    parser.add_argument("--questions", type=int, default=320)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--policy", action="append", default=[], help="further ways, such as fixed:5")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    benchmark = get_benchmark(args.benchmark)
    questions = benchmark.load(args.data, args.questions)
    asked = list(zip(questions, prompts_of(benchmark, questions, args.question_suffix), strict=True))
    parts = [asked[turn :: args.rounds] for turn in range(args.rounds)]
    sdpa = load(args, "sdpa")
    ways = {"one by one, with attention weights": Way(parts, reference_way, load(args, "eager"))}
    for text in ["never", *args.policy]:
        ways[f"batched, {text}"] = Way(parts, batched_way, sdpa, parse_named(text), args.batch)
    setting = setting_of(args, model=args.model, tokens=f"{args.benchmark}, batch {args.batch}")
    report = Report(setting, args.json)
    times = interleaved({name: way.seconds for name, way in ways.items()}, args.rounds)
    _add(report, ways, times)


def _add(report: Report, ways: dict[str, Way], times: Times) -> None:
    reference, full, *_ = ways
    # The first round warms up.
    processor = {name: way.processor[1:] for name, way in ways.items()}
    ratios = {}
    for name in list(ways)[1:]:
        ratios[f"one by one / {name}"] = ratio(times, [reference], [name], "at least 3")
        ratios[f"the same, processor seconds: {name}"] = ratio(processor, [reference], [name])
    changed = [key for key, text in ways[reference].answers.items() if ways[full].answers[key] != text]
    print(f"answers that batching changed: {len(changed)} of {len(ways[reference].answers)}\n")
    report.add(times, ratios)
    if changed:
        raise SystemExit(f"batching changed the answers of {changed}")


if __name__ == "__main__":
    main()

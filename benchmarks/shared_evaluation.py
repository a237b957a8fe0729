"""Questions of a benchmark answered with each image computed once, against each question on its own.

What ``dyvte eval`` does after loading and before timing: batches of questions about the same images, and
every policy in turn on each of them. Rounds alternate; each starts with an empty store. Processor seconds are
printed too: they say what is left when other work runs beside. The answers must be the same; a changed one
ends the script with an error. Logits differ by rounding: rows with a gate within 1e-5 of a threshold, which
could differ, are counted.

    python benchmarks/shared_evaluation.py                                 # mini-GQA, four policies
    python benchmarks/shared_evaluation.py --benchmark mme --data data/scenes/mini_mme
    python benchmarks/shared_evaluation.py --questions 96 --rounds 2       # its small form
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import Report, arguments, interleaved, ratio, setting_of

from dyvte.backbones import get_template, load_backbone
from dyvte.evaluation.generation import Pipeline, answer, encoded_batches, plan_batches, shown_by
from dyvte.evaluation.run_log import Answer
from dyvte.evaluation.runner import prompts_of
from dyvte.evaluation.settings import NamedPolicy, parse_named
from dyvte.policies import LearnedPolicy
from dyvte.runtime import ImageStore
from dyvte.tasks.base import Question, get_benchmark

ROOT = Path(__file__).resolve().parents[1]
POLICIES = ("never", "fixed:5", "freeze:3:8", f"gates:{ROOT / 'checkpoints' / 'tiny-llava-gates'}")


@dataclass
class Way:
    """Every policy over all questions; notes answers and processor seconds."""

    pipeline: Pipeline
    questions: Sequence[Question]
    prompts: Sequence[str]
    policies: Sequence[NamedPolicy]
    batch_size: int
    shares: bool
    answers: dict[tuple[str, str], Answer] = field(default_factory=dict)
    processor: list[float] = field(default_factory=list)

    def seconds(self) -> float:
        """Of all of them."""
        pipeline = replace(self.pipeline, images=ImageStore() if self.shares else None)
        start, start_processor = time.perf_counter(), time.process_time()
        plan = plan_batches(pipeline, self.prompts, self.batch_size, shown_by(self.questions))
        exits = [(named.name, named.exits()) for named in self.policies]
        for batch in encoded_batches(pipeline, self.questions, self.prompts, plan, range(len(plan))):
            for name, one in exits:
                given = answer(pipeline, batch, one)
                self.answers.update({(name, found.question_id): found for found in given})
        self.processor.append(time.process_time() - start_processor)
        return time.perf_counter() - start


def layers_of(given: Answer) -> tuple[int, int | None]:
    """After which layers the image left and was frozen."""
    return given.exit_layer, given.freeze_layer


def is_close(given: Answer, policy: LearnedPolicy) -> bool:
    """Does some gate of a row state a probability within 1e-5 of its threshold?"""
    heads = ((given.gate_logits, policy.threshold), (given.freeze_logits, policy.freeze_threshold))
    return any(
        abs(0.5 + 0.5 * math.tanh(logit / 2) - threshold) <= 1e-5
        for logits, threshold in heads
        for logit in logits
        if logit is not None
    )


def main() -> None:
    parser = arguments(__doc__, batch=64)
    parser.set_defaults(rounds=3)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "tiny-llava"))
    parser.add_argument("--benchmark", default="gqa")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "scenes" / "mini_gqa")
    parser.add_argument("--question-suffix", default="", help="the embedded backbone knows none")
    parser.add_argument("--questions", type=int, help="about this many; default: all")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--policy", action="append", help="default: " + ", ".join(POLICIES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load_backbone(args.model, dtype=args.dtype, device=args.device)
    pipeline = Pipeline(model, processor, get_template("auto", processor), args.max_new_tokens)
    benchmark = get_benchmark(args.benchmark)
    questions = benchmark.load(args.data, args.questions)
    prompts = prompts_of(benchmark, questions, args.question_suffix)
    policies = [parse_named(text) for text in args.policy or POLICIES]
    alone, shared = (
        Way(pipeline, questions, prompts, policies, args.batch, shares) for shares in (False, True)
    )
    tokens = f"{args.benchmark}, {len(questions)} questions, {len(policies)} policies, batch {args.batch}"
    report = Report(setting_of(args, model=args.model, tokens=tokens), args.json)
    times = interleaved({"alone": alone.seconds, "shared": shared.seconds}, args.rounds)
    # The first round warms up.
    processor_times = {"alone": alone.processor[1:], "shared": shared.processor[1:]}
    pairs = {key: (one, shared.answers[key]) for key, one in alone.answers.items()}
    changed = [key for key, (one, other) in pairs.items() if one.prediction != other.prediction]
    moved = sum(layers_of(one) != layers_of(other) for one, other in pairs.values())
    thresholds = {named.name: named.policy for named in policies if isinstance(named.policy, LearnedPolicy)}
    close = sum(
        is_close(one, thresholds[name]) for (name, _), one in alone.answers.items() if name in thresholds
    )
    print(f"answers that sharing changed: {len(changed)} of {len(pairs)}; schedules: {moved}")
    print(f"rows with a gate within 1e-5 of its threshold: {close}\n")
    report.add(
        times,
        {
            "shared / alone": ratio(times, ["shared"], ["alone"], "at most 0.5"),
            "the same, processor seconds": ratio(processor_times, ["shared"], ["alone"]),
        },
    )
    if changed:
        raise SystemExit(f"sharing changed the answers of {changed}")


if __name__ == "__main__":
    main()

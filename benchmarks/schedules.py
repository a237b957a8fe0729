"""Prefill time at the schedules of a real backbone, beside FLOPs: policies side by side on real questions.

All policies prefill the same batches once in each round, in a new order; medians of the per-round ratios to
the plain model are reported, and what the FLOPs of the decoder say of the same schedules (VTW's convention;
vision tower, head and gates are not counted, but timed).

    python benchmarks/schedules.py --config configs/eval_smol.yaml --policy fixed:24 --policy freeze:18:24
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from common import Report, interleaved, ratio, timed
from passes import prefill_pass

from dyvte.backbones.sizes import decoder_shape
from dyvte.config import load_config
from dyvte.costs.prefill import prefill_flops
from dyvte.costs.schedules import kv_share, schedule_compute
from dyvte.evaluation.generation import encoded_batches, plan_batches, shown_by
from dyvte.evaluation.latency import even_batches
from dyvte.evaluation.runner import EvalConfig, load_pipeline, load_questions, prompts_of
from dyvte.evaluation.settings import parse_policies
from dyvte.tasks.base import get_benchmark

PLAIN = "plain model"


def main() -> None:
    """Load, decide, time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="as dyvte eval takes it")
    parser.add_argument("--policy", action="append", default=[], help="as dyvte eval takes it; several")
    parser.add_argument("--batch", type=int, default=8, help="questions prefilled together")
    parser.add_argument("--batches", type=int, default=2, help="batches, evenly over the benchmark")
    parser.add_argument("--limit", type=int, default=64, help="of the benchmark's first questions")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "processor"), default="processor", help="whose seconds")
    parser.add_argument("--json", help="also write the ratios to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(EvalConfig, args.config)
    benchmark, pipeline = get_benchmark(config.benchmark), load_pipeline(config)
    questions = load_questions(benchmark, config.data, args.limit, 0)
    prompts = prompts_of(benchmark, questions, config.question_suffix)
    plan = plan_batches(pipeline, prompts, args.batch, shown_by(questions))
    batches = list(encoded_batches(pipeline, questions, prompts, plan, even_batches(len(plan), args.batches)))
    policies = parse_policies(args.policy)
    model, shape = pipeline.model, decoder_shape(pipeline.model.config)
    runs: dict[str, list[Callable[[], None]]] = {
        PLAIN: [prefill_pass(model, batch.inputs) for batch in batches]
    }
    flops, compute = {}, {}
    for named in policies:
        runs[named.name] = [prefill_pass(model, batch.inputs, named.exits()) for batch in batches]
        spent = full = updated = 0.0
        rows = 0
        for batch in batches:
            with torch.inference_mode(), named.exits()(model) as run:
                model(**batch.inputs, use_cache=True, logits_to_keep=1)
            visual_B = run.records[-1].num_visual_B
            text_B = batch.num_tokens_B.cpu() - visual_B
            layers = (run.exit_layers, "vtw", run.freeze_layers)
            spent += float(prefill_flops(shape, text_B, visual_B, *layers).sum())
            full += float(prefill_flops(shape, text_B, visual_B, shape.num_layers).sum())
            share = schedule_compute(run.freeze_layers, run.exit_layers, shape.num_layers, kv_share(shape))
            updated += float((share * visual_B).sum())
            rows += int(visual_B.sum())
        flops[named.name], compute[named.name] = spent / full, updated / rows

    def all_batches(name: str) -> Callable[[], None]:
        return lambda: [one() for one in runs[name]] and None

    timers = {name: timed(all_batches(name), model.device, args.clock) for name in runs}
    times = interleaved(timers, args.rounds)
    setting = {
        "backbone": config.model.path,
        "batches": f"{len(batches)} of {args.batch} questions of {benchmark.title}",
        "clock": args.clock,
        "threads": str(args.threads),
        "rounds": str(args.rounds),
    }
    report = Report(setting, args.json)
    found = {
        name: ratio(times, [name], [PLAIN], f"FLOPs {flops[name]:.3f}, visual compute {compute[name]:.3f}")
        for name in runs
        if name != PLAIN
    }
    report.add(times, found)


if __name__ == "__main__":
    main()

"""Choose layers in which visual tokens are read but not updated, by what freezing them does to the answer.

Of a visual token a frozen layer computes key and value and nothing else. The search freezes one layer after
the other: each time the one whose freezing harms the answers least, beside those frozen already. Every
candidate is a pass of the real runtime, judged against the un-pruned model's own answers; L layers make
L (L + 1) / 2 candidates.

Beside it, in the same table and plot: ShortV's rule (arXiv 2504.00502), which freezes the layers of least
layer contribution, KL(full || this layer alone frozen) at the last position of the prompt; and the last
layers, which is what --policy freeze:F does.

Layers are counted from 0, as ShortV does. A set is used as it is printed: --reduction frozen:0,2-3,12,17-31,
with any --policy. Sets are fitted to their samples: --held-out-path shows what they keep elsewhere.

Written to --output: frozen-sets.md, frozen-sets.json, frozen-sets.png, and effects.json, all that was
measured. The same command started again goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dyvte.commands.training_options import add_tracing, tracing_config_of

EXAMPLES = """
dyvte search-frozen --config configs/embedded.yaml --data_path data/scenes/instruct/calibration.json \\
    --num-samples 100 --held-out-path data/scenes/instruct/validation.json --output runs/frozen
dyvte eval --config configs/eval_embedded.yaml --policy fixed:9 --reduction frozen:4-9
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte search-frozen``."""
    from dyvte.calibration.frozen_sets import OBJECTIVES

    parser.add_argument("--output", type=Path, required=True, help="folder for results (required)")
    parser.add_argument("--num-samples", type=int, default=100, help="samples, drawn at random")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="risk",
        help="what the choice keeps small: the mean risk (KL(full || frozen) over the answer), or the "
        "share of answers that change",
    )
    parser.add_argument(
        "--largest", type=int, help="stop at sets of so many layers (default: all layers of the backbone)"
    )
    parser.add_argument(
        "--keep",
        type=float,
        action="append",
        help="share of answers that must stay the same: the largest set that keeps it is named; several "
        "(default: 0.99 and 0.98)",
    )
    parser.add_argument(
        "--held-out-path", type=Path, help="data of the same kind on which the sets found are judged as well"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and exit")
    add_tracing(
        parser,
        omit=(
            "data.limit",
            "teacher.reductions",
            "teacher.exit_every",
            "teacher.exits_per_chunk",
            "teacher.freeze_every",
            "teacher.freeze_layers",
            "teacher.features",
            "teacher.reference",
            "teacher.try_answers",
            "teacher.shard_batches",
            "teacher.memory_budget",
        ),
    )


def run(args: argparse.Namespace) -> int:
    """Search; print the table and the choices."""
    from dataclasses import replace

    from dyvte.errors import ConfigError
    from dyvte.reporting.frozen_sets import choices_table, frozen_table, write_frozen_sets
    from dyvte.tracing.frozen_search import estimate_search, search_frozen

    keep = args.keep or [0.99, 0.98]
    if wrong := [share for share in keep if not 0 <= share <= 1]:
        raise ConfigError(f"keep {wrong[0]}: expected a share of answers, 0 to 1")
    cfg = tracing_config_of(args, [f"data.limit={args.num_samples}"])
    held_out = None if args.held_out_path is None else replace(cfg.data, path=args.held_out_path, hub_id=None)
    if args.dry_run:
        found = estimate_search(cfg, largest=args.largest, held_out=held_out)
        print(f"{found.num_layers} layers: at most {found.sets} sets on {found.samples} samples")
        if held_out is not None:
            print(f"the sets of the table on {found.held_out_samples} held-out samples")
        print(
            f"work of about {found.full_passes:.0f} full passes over the samples: {found.flops / 1e12:,.1f} "
            f"TFLOP in the decoder, {found.seconds:.0f} s at the speed measured here"
        )
        return 0
    found = search_frozen(cfg, args.output, largest=args.largest, objective=args.objective, held_out=held_out)
    write_frozen_sets(found, args.output, keep)
    print(frozen_table(found))
    print()
    print(choices_table(found, keep))
    print(f"written: {args.output}")
    return 0

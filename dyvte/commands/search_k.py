"""VTW's fixed exit layer: the first K whose mean KL to the full model is at most eta, from one pass.

Defaults are the paper's: 20 samples, eta 0.003, KL(exit || full) at the last prompt position. --write makes a
checkpoint without gates: every row leaves after K.

Exit code: 0 a K was found, 2 bad input, 3 no K of the range qualifies (the curve is printed and stored all
the same; nothing is written with --write).
"""

from __future__ import annotations

import argparse
import sys

from dyvte.commands.training_options import add_tracing, tracing_config_of

EXAMPLES = """
dyvte search-k --config configs/embedded.yaml --data_path data/scenes/instruct/calibration.json
dyvte search-k --model_name_or_path llava-hf/llava-1.5-7b-hf --data_path data.json \\
    --image_folder images --write gates-fixed
"""

EXIT_NONE_QUALIFIES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte search-k``."""
    parser.add_argument("--eta", type=float, default=0.003, help="bound on the mean KL, in nats")
    parser.add_argument("--num-samples", type=int, default=20, help="samples, drawn at random")
    parser.add_argument(
        "--k-range", type=int, nargs=2, metavar=("FIRST", "LAST"), help="K tried, default: 1 to L-1"
    )
    parser.add_argument(
        "--direction", choices=("exit||full", "full||exit"), default="exit||full", help="of the KL"
    )
    parser.add_argument(
        "--positions",
        choices=("last_prompt", "answer"),
        default="last_prompt",
        help="where the KL is taken; answer: at the data's answers",
    )
    parser.add_argument("--write", metavar="FOLDER", help="store K there: as the gates' fallback, or alone")
    parser.add_argument("--json", metavar="FILE", help="store the whole curve there")
    parser.add_argument("--plot", metavar="FILE", help="draw KL over K there, png or svg (needs matplotlib)")
    add_tracing(parser, omit=("data.limit", "teacher.label_source", "teacher.reductions"))


def run(args: argparse.Namespace) -> int:
    """Search; print the curve and K; return the exit code."""
    import json

    from dyvte.backbones import describe_config, read_model_config
    from dyvte.calibration import check_plot, plot_search, write_fixed_layer
    from dyvte.files import write_atomically
    from dyvte.gates import GateConfig
    from dyvte.tracing.search import search_k

    if args.plot:
        check_plot(args.plot)  # before the model runs, not after
    cfg = tracing_config_of(args, [f"data.limit={args.num_samples}"])
    found = search_k(
        cfg,
        eta=args.eta,
        k_range=tuple(args.k_range) if args.k_range else None,
        direction=args.direction,
        positions=args.positions,
    )
    print(f"mean KL({found.direction}) over {found.num_samples} samples, positions: {found.positions}")
    for k, value in enumerate(found.kl.tolist()):
        print(f"  K = {k:3d}  {value:.6f}{'  <- first within eta' if k == found.k else ''}")
    record = {
        "k": found.k,
        "eta": found.eta,
        "k_range": list(found.k_range),
        "direction": found.direction,
        "positions": found.positions,
        "num_samples": found.num_samples,
        "kl": found.kl.tolist(),
    }
    if args.json:
        write_atomically(args.json, json.dumps(record, indent=2) + "\n")
    if args.plot:
        plot_search(found, args.plot)
        print(f"written: {args.plot}")
    if found.k is None:
        first, last = found.k_range
        least = min(range(first, last + 1), key=lambda k: float(found.kl[k]))
        print(
            f"none qualifies: no K in {first}..{last} has a mean KL of at most {found.eta:g}; the least is "
            f"{float(found.kl[least]):.6f} at K = {least}. Raise --eta, or widen --k-range",
            file=sys.stderr,
        )
        return EXIT_NONE_QUALIFIES
    print(f"K = {found.k} of {len(found.kl) - 1}")
    if args.write:
        shape = describe_config(read_model_config(cfg.model))
        base = GateConfig(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            backbone={"id": cfg.model.path, "model_type": shape.model_type, "fingerprint": shape.fingerprint},
        )
        write_fixed_layer(args.write, base, found.k, record)
        print(f"written: {args.write}/gate_config.json")
    return 0

"""Set up gates for a backbone: reads its config.json only, copies no backbone."""

from __future__ import annotations

import argparse

EXAMPLES = """
dyvte init --model llava-hf/llava-1.5-7b-hf --output gates-7b
dyvte init --model checkpoints/tiny-llava --output gates --architecture scaled --freeze-head
dyvte init --model checkpoints/tiny-llava --output gates --architecture reference \\
    --objective reference_label
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte init``."""
    from dyvte.gates import ARCHITECTURES, DEFAULT_FEATURES, FEATURES
    from dyvte.objectives import OBJECTIVES

    parser.add_argument("--model", required=True, help="backbone: folder or hub id (required)")
    parser.add_argument(
        "--output", required=True, help="folder for gate_config.json and gates.safetensors (required)"
    )
    parser.add_argument(
        "--architecture", choices=ARCHITECTURES.names(), default="shared", help="what a gate is made of"
    )
    parser.add_argument(
        "--features",
        default=",".join(DEFAULT_FEATURES),
        help=f"what they read, comma-separated, out of {', '.join(FEATURES)}",
    )
    parser.add_argument("--gate-hidden-size", type=int, default=0, help="width; 0: the architecture's own")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES.names(),
        default="expected_risk",
        help="what they will be trained with: expected_risk starts with all exits equally likely",
    )
    parser.add_argument(
        "--freeze-head",
        action="store_true",
        help="a second head that says when visual tokens are no longer updated; it learns from traces with "
        "freeze layers",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the Xavier initialisation")
    parser.add_argument("--overwrite", action="store_true", help="replace gates that are there")


def run(args: argparse.Namespace) -> int:
    """Write the gates; print their size and the next step."""
    from pathlib import Path

    from dyvte.backbones import describe_config
    from dyvte.errors import ConfigError
    from dyvte.gates import GateConfig, GateStack, uniform_freeze_offsets, uniform_offsets
    from dyvte.gates.config import INITIALISED
    from dyvte.objectives import OBJECTIVES

    output = Path(args.output)
    if (output / "gate_config.json").exists() and not args.overwrite:
        raise ConfigError(f"{output} holds gates already; choose another folder, or pass --overwrite")
    objective, freezes = OBJECTIVES.get(args.objective), {}
    if args.freeze_head:
        if not objective.trains_freezes:
            raise ConfigError(f"objective {args.objective} trains no freeze head: omit --freeze-head")
        freezes = {"freeze_head": True}
    shape = describe_config(args.model)
    if freezes and objective.starts_uniform:
        freezes["freeze_offsets"] = uniform_freeze_offsets(shape.num_layers)
    config = GateConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        architecture=args.architecture,
        gate_hidden_size=args.gate_hidden_size,
        features=tuple(args.features.split(",")),
        offsets=uniform_offsets(shape.num_layers) if objective.starts_uniform else (),
        backbone={"id": str(args.model), "model_type": shape.model_type, "fingerprint": shape.fingerprint},
        training={INITIALISED: "xavier_uniform", "seed": args.seed},
        **freezes,
    )
    gates = GateStack.init(config, seed=args.seed)
    gates.save_pretrained(output)
    parameters = sum(parameter.numel() for parameter in gates.parameters())
    size = (output / "gates.safetensors").stat().st_size
    print(
        f"{args.architecture} gates for {shape.model_type}, {shape.num_layers} layers of "
        f"{shape.hidden_size}: {parameters:,} parameters ({parameters / shape.num_layers:,.0f} a layer), "
        f"{size / 1e6:.2f} MB"
    )
    print(f"written: {output}")
    print(
        f"next: bash scripts/finetune_visual_gate.sh --model_name_or_path {args.model} --gates {output} "
        "--data_path DATA.json --image_folder IMAGES --output_dir OUTPUT"
    )
    return 0

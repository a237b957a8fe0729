"""Measure what a backbone's heads and neurons do with visual tokens, on samples drawn at random.

The profile says which heads look at the image and which neurons it moves (YOPO, arXiv 2410.06169); the
reductions heads:FOLDER:N and ffn:SHARE:FOLDER of other commands read it.
"""

from __future__ import annotations

import argparse

from dyvte.commands.training_options import add_tracing, tracing_config_of

EXAMPLES = """
dyvte profile --config configs/embedded.yaml \\
    --data_path data/scenes/instruct/calibration.json --output runs/profile
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte profile``."""
    add_own_arguments(parser)
    add_tracing(parser, omit=("teacher.reductions", "data.limit"))


def add_own_arguments(parser: argparse.ArgumentParser, *, hidden: bool = False) -> None:
    """Its options beside those of a run of the teacher; ``hidden`` from help by its former name.

    Parameters
    ----------
    parser
        Of the command.
    hidden
        Keep them out of the help.
    """

    def text(shown: str) -> str:
        return argparse.SUPPRESS if hidden else shown

    parser.add_argument("--output", help=text("folder of the profile (required)"))
    parser.add_argument("--num-samples", type=int, default=100, help=text("samples, drawn at random"))


def run(args: argparse.Namespace) -> int:
    """Write a visual profile; print what it says."""
    from dyvte.errors import ConfigError
    from dyvte.tracing.search import visual_profile

    if args.output is None:
        raise ConfigError("--output must be given, see dyvte profile --help")
    profile = visual_profile(tracing_config_of(args, [f"data.limit={args.num_samples}"]))
    profile.save_pretrained(args.output)
    print(f"{len(profile.rho_SLH)} samples; attention to the image over attention to text, by layer:")
    for index, rho_SH in enumerate(profile.rho_SLH.unbind(1)):
        mean_H = rho_SH.mean(0)
        print(
            f"  layer {index + 1:3d}  mean {mean_H.mean():.3f}  least head {mean_H.min():.3f}  "
            f"most {mean_H.max():.3f}"
        )
    print(f"written: {args.output}")
    return 0

"""The papers' tables and plots, on any backbone and benchmark.

Each study writes NAME.json (all numbers), NAME.md (definition and table) and NAME.png, svg and pdf below
--output. `dyvte analyze --list` names them, `all` is every study that the given options allow. Accuracy
studies put all questions (--limit), through the same evaluation as dyvte eval: they share their runs below
--output, a killed run goes on where it stopped. Studies of attention and KL look at --samples questions.
"""

from __future__ import annotations

import argparse

EXAMPLES = """
dyvte analyze last_token stages layers --config configs/eval_embedded.yaml --limit 200 \\
    --output runs/analysis
dyvte analyze migration controls --model llava-hf/llava-1.5-7b-hf --benchmark mme --data /data/MME \\
    --layer 16 --output results/vtw
dyvte analyze exits transfer --config configs/eval_embedded.yaml --gates own/gates --gates other/gates \\
    --output runs/analysis
dyvte analyze gate_inputs --config configs/eval_embedded.yaml --training configs/embedded.yaml \\
    --output runs/analysis
"""

NAMES = {"etas": ("eta",), "feature_sets": ("features",)}
ALL = "all"
_NEEDS = {"exits": "gates", "transfer": "gates", "shift": "gates", "gate_inputs": "training"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte analyze``: the settings of its configuration."""
    from dyvte.analysis import AnalysisConfig
    from dyvte.commands.options import add_settings

    parser.add_argument("studies", nargs="+", metavar="NAME", help="studies, or all")
    parser.add_argument("--list", action=_List, nargs=0, help="name the studies and exit")
    add_settings(parser, AnalysisConfig, NAMES, omit=("policies", "reductions"))


def run(args: argparse.Namespace) -> int:
    """Do the studies one after the other on one loaded backbone; print each table."""
    from dyvte.analysis import STUDIES, AnalysisConfig, check_study, get_study, open_subject
    from dyvte.commands.options import config_from

    for name in args.studies:
        if name != ALL:
            check_study(name)
    config = config_from(AnalysisConfig, args)
    names = chosen(args.studies, config)
    subject = open_subject(config, transfers="transfer" in names)
    for name in names:
        source = STUDIES[name][0]
        found = get_study(name)(subject)
        files = found.write(config.output, name, source, subject.about())
        print(f"{found.title} (after {source})\n\n{found.table}\n")
        for note in found.notes:
            print(f"omitted: {note}")
        print(f"written: {', '.join(map(str, files))}\n", flush=True)
    return 0


class _List(argparse.Action):
    """Names the studies, and exits: like a help option it needs nothing else."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from dyvte.analysis import STUDIES

        width = max(map(len, STUDIES))
        for name, (source, text) in STUDIES.items():
            print(f"{name:{width}}  {text} ({source})")
        parser.exit()


def chosen(names: list[str], config: object) -> list[str]:
    """The studies asked for, in the order of the registry; `all` omits those whose option is missing.

    Parameters
    ----------
    names
        As the command line gives them.
    config
        With the options that some studies need.
    """
    from dyvte.analysis import STUDIES

    if ALL not in names:
        return [name for name in STUDIES if name in names]
    found = []
    for name in STUDIES:
        needed = _NEEDS.get(name)
        if needed and not getattr(config, needed) and name not in names:
            print(f"omitted: {name} needs --{needed}\n")
            continue
        found.append(name)
    return found

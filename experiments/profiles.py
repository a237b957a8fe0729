"""Where each type of question is answered: same answer at every traced schedule, by type, from traces alone.

dyvte trace --config configs/smol.yaml --output runs/smol/trace
python experiments/profiles.py runs/smol/trace --data data/natural/instruct/train.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dyvte.calibration.path import Labels
from dyvte.formatting import markdown_table
from dyvte.teacher import TraceStore
from dyvte.teacher.trace import Trace


def by_type(trace: Trace, type_of: Mapping[str, str]) -> dict[str, Tensor]:
    """Rows of every type, the largest types first, then all.

    Parameters
    ----------
    trace
        Traced samples.
    type_of
        Type of each sample, by id.
    """
    kinds = [type_of[sample] for sample in trace.sample_ids]
    names = sorted(set(kinds), key=lambda name: (-kinds.count(name), name))
    rows = {name: torch.tensor([i for i, kind in enumerate(kinds) if kind == name]) for name in names}
    return {**rows, "all": torch.arange(len(kinds))}


def main() -> None:
    """Read, count, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", type=Path, nargs="+", help="folders of `dyvte trace`, taken together")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="the json that each was made from"
    )
    args = parser.parse_args()
    trace = Trace.cat([TraceStore.open(folder).trace() for folder in args.traces])
    type_of = {
        one["id"]: one.get("type", "question")
        for path in args.data
        for one in json.loads(path.read_text(encoding="utf-8"))
    }
    same, last = Labels.of(trace, "same_answer"), trace.num_layers
    rows_of = by_type(trace, type_of)
    exits = [k for k in trace.exits if k < last]
    print(
        f"Same answer in %, {len(trace)} questions; exits after layer k, and frozen after f but never gone:\n"
    )
    head = ["type", "questions", *(f"k = {k}" for k in exits), *(f"f = {f}" for f in trace.freezes)]
    plain_BL1, frozen = same.values_BGL1[:, -1], same.values_BGL1[:, :-1, last]
    table = [
        [
            name,
            str(len(rows)),
            *(f"{100 * float(plain_BL1[rows, k].mean()):.0f}" for k in exits),
            *(f"{100 * float(frozen[rows, i].mean()):.0f}" for i in range(len(trace.freezes))),
        ]
        for name, rows in rows_of.items()
    ]
    print(markdown_table(head, table))
    if not trace.freezes:
        return
    print("\nSame answer in %, updated in layers 1..f and read in 1..k, all questions:\n")
    grid = [
        [
            f"f = {f}",
            *(
                f"{100 * float(same.values_BGL1[:, i, k].mean()):.1f}" if f < k else ""
                for k in (*exits, last)
            ),
        ]
        for i, f in enumerate(trace.freezes)
    ]
    grid.append(["f = k", *(f"{100 * float(plain_BL1[:, k].mean()):.1f}" for k in (*exits, last))])
    print(markdown_table(["", *(f"k = {k}" for k in (*exits, last))], grid))


if __name__ == "__main__":
    main()

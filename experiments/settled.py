"""Do gates decide better when they are told how far the text has settled?

Three things a gate could read beside its features (DyVTE, Eq. 1): how the last prompt token changed since the
layer before, how both parts changed, and what the language head reads off the last prompt token (the odds of
its likeliest next token over the second, and the entropy). All follow from traced states, so the same traces
are written again with further parts, and the same training is run on each, over seeds.

    python experiments/settled.py --scenes data/scenes/instruct --config configs/embedded_states.yaml
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from recipes import TARGETS, judged, table
from torch import Tensor, nn
from workbench import SPLITS, Workbench, arguments, hidden_size

from dyvte.backbones import open_backbone
from dyvte.comparison.records import plain
from dyvte.evaluation.latency import machine
from dyvte.files import write_atomically
from dyvte.gates import DEFAULT_FEATURES
from dyvte.teacher.trace import Trace
from dyvte.training.target import TargetConfig

STAND_INS = ("mean_visual", "last_visual")
"""Names under which further parts are stored: gates know four parts, and these two are not traced here."""
CODES = 8
"""Numbers are spread over so many bumps: a gate normalises its parts, and the scale of one number is lost."""

Part: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""States (..., P D) of a layer and of the layer before to a part (..., D)."""


def change(part: int) -> Part:
    """How a part changed since the layer before."""

    def of(now: Tensor, before: Tensor) -> Tensor:
        return (now - before).unflatten(-1, (len(DEFAULT_FEATURES), -1))[..., part, :]

    return of


def margin(norm: nn.Module, head: nn.Module) -> Part:
    """Log odds of the likeliest next token over the second and the entropy, in bumps, padded to D."""

    def of(now: Tensor, before: Tensor) -> Tensor:
        last = now.unflatten(-1, (len(DEFAULT_FEATURES), -1))[..., -1, :].float()
        out = torch.zeros_like(last)
        flat, into = last.flatten(0, -2), out.view(-1, out.shape[-1])
        for start in range(0, len(flat), 256):
            log_odds = head(norm(flat[start : start + 256])).log_softmax(-1)
            two = log_odds.topk(2, -1).values
            entropy = -(log_odds.exp() * log_odds).sum(-1)
            into[start : start + 256, :CODES] = bumps((two[:, 0] - two[:, 1]) / 8)
            into[start : start + 256, CODES : 2 * CODES] = bumps(entropy / 4)
        return out

    return of


def bumps(values: Tensor) -> Tensor:
    """(N,) numbers, mostly in 0..1, as (N, CODES) weights of evenly spread bumps."""
    centres = torch.linspace(0, 1, CODES, device=values.device)
    return torch.softmax(-((values.clamp(0, 1)[:, None] - centres) * CODES).square(), -1)


def with_parts(trace: Trace, parts: Sequence[Part]) -> Trace:
    """The trace whose features hold further parts, each stream's layers compared with its own."""
    streams, grid = trace.streams().float(), trace.grid
    first = streams[:, -1, :1] if grid is None else grid.embeddings[:, None].float()
    before = torch.cat((first[:, None].expand(-1, streams.shape[1], -1, -1), streams[:, :, :-1]), 2)
    wide = torch.cat((streams, *(part(streams, before) for part in parts)), -1).to(trace.features.dtype)
    if grid is None:
        return dataclasses.replace(trace, features=wide[:, -1])
    start = grid.embeddings.float()
    embeddings = torch.cat((start, *(part(start, start) for part in parts)), -1)
    row = {f: i for i, f in enumerate(grid.freeze_layers)}
    features = torch.stack([wide[:, row[f], layer - 1] for f, layer in grid.stream_layers], 1)
    wider = dataclasses.replace(
        grid, embeddings=embeddings.to(grid.embeddings.dtype), features=features.to(grid.features.dtype)
    )
    return dataclasses.replace(trace, features=wide[:, -1], grid=wider)


def variants(bench: Workbench) -> Mapping[str, Sequence[Part]]:
    """What is read beside the features, by name."""
    model, _ = open_backbone(bench.settings().model)
    text = model.get_decoder()
    read = margin(getattr(text, "language_model", text).norm, model.get_output_embeddings())
    last, mean = change(1), change(0)
    return {
        "nothing": (),
        "change-last": (last,),
        "change-both": (last, mean),
        "margin": (read,),
        "change-margin": (last, read),
    }


def main() -> None:
    """Trace, add parts, train, judge; print a table."""
    parser = arguments(__doc__)
    parser.add_argument("--alpha", type=float, default=0.02, help="answers that may change")
    parser.add_argument("--only", nargs="+", help="variants by name; default: all")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    args = parser.parse_args()
    bench = Workbench.of(args)
    known = variants(bench)
    if unknown := sorted({*(args.only or ())} - {*known}):
        parser.error(f"--only: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    for split in SPLITS:
        bench.traces(split)
    target, found = TargetConfig(alpha=args.alpha), {}
    size = hidden_size(bench.work / "trace-train")
    for name in args.only or known:
        parts = known[name]
        features = (*DEFAULT_FEATURES, *STAND_INS[: len(parts)])
        add = partial(with_parts, parts=parts)
        with torch.no_grad():
            train, calibration, test = bench.with_features(name, add, features, size * len(features))
        read = (f"teacher.features={json.dumps(features)}", f"gates.features={json.dumps(features)}")
        folders = list(bench.gates(f"settled-{name}", *read, trace=train))
        found |= judged({name: folders}, calibration, test, target)
        print(f"{name}: {found[name]}", flush=True)
    print(f"\n{machine()}\n{len(test.trace)} test samples\n\n{table(found, args.alpha)}")
    content = {"machine": machine(), "targets": TARGETS, "variants": found}
    write_atomically(args.json or bench.work / "settled.json", json.dumps(plain(content), indent=2) + "\n")


if __name__ == "__main__":
    main()

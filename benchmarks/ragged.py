"""A batch whose rows freeze and leave at different layers: FLOPs, KV bytes and time against its rows' sum.

Rows leave evenly spread over the layers, the last one never; in the mixed batch each is frozen after half
of its layers, so that a layer meets rows whose image is updated, frozen and gone. All rows are equally long,
then each 20 text tokens longer than the one before.

    python benchmarks/ragged.py --hidden 1024 --layers 8 --batch 4
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from common import TEXT, TOKENS, Report, arguments, interleaved, ratio, setting_of, timed
from passes import frozen_pass, in_order, kv_bytes, layer_pass, prefill, prefill_pass, rest_pass
from random_llava import Inputs, build_model, make_inputs, oracle, spread_exits
from torch.utils.flop_counter import FlopCounterMode

MORE_TEXT = 20


def one_row(inputs: Inputs, row: int) -> Inputs:
    return {name: value[row : row + 1] for name, value in inputs.items()}


@contextmanager
def eager_attention(model: torch.nn.Module) -> Iterator[None]:
    """Plain products, which the FLOP counter knows."""
    config = model.get_decoder().config
    attention, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = attention


def flops_of(run: Callable[[], None]) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def prefill_flops(model: torch.nn.Module, inputs: Inputs, exits: Sequence[int]) -> int:
    with eager_attention(model):
        return flops_of(prefill_pass(model, inputs, oracle(exits)))


def prefill_bytes(model: torch.nn.Module, inputs: Inputs, exits: Sequence[int]) -> int:
    """Of the K/V cache after a prefill."""
    with torch.inference_mode(), oracle(exits)(model):
        return kv_bytes(prefill(model, inputs))


def padded(rows: Sequence[Inputs]) -> Inputs:
    """The rows as one left-padded batch."""
    width = max(row["input_ids"].shape[1] for row in rows)
    pad = torch.nn.functional.pad
    lines = {
        name: torch.cat([pad(row[name], (width - row[name].shape[1], 0)) for row in rows])
        for name in ("input_ids", "attention_mask")
    }
    return {**lines, "pixel_values": torch.cat([row["pixel_values"] for row in rows])}


def ideal_layers(
    model: torch.nn.Module,
    exits: Sequence[int],
    tokens: int = TOKENS,
    text: int = TEXT,
    freezes: Sequence[int] = (),
) -> Callable[[], None]:
    """Each layer called directly: on rows that update the image, on those that read it, on the others' text.

    Without ``freezes`` rows update the image as long as they read it.
    """
    passes = []
    for index in range(len(model.get_decoder().layers)):
        seeing = sum(k > index for k in exits)
        updating = sum(f > index for f in freezes) if freezes else seeing
        for rows, length in ((updating, tokens), (len(exits) - seeing, text)):
            if rows:
                passes.append(layer_pass(model, rows, length, index, index + 1))
        if seeing > updating:
            passes.append(frozen_pass(model, seeing - updating, index, index + 1))
    return in_order(passes)


def over_padded_stock(model: torch.nn.Module, batch: Inputs, exits: Sequence[int]) -> float:
    """Decoder FLOPs over what the stock layers cost on the rows present in each, padded to the longest."""
    more = batch["input_ids"].shape[1] - TOKENS
    with eager_attention(model):
        got = flops_of(prefill_pass(model, batch, oracle(exits))) - flops_of(rest_pass(model, batch))
        return got / flops_of(ideal_layers(model, exits, TOKENS + more, TEXT + more))


def main() -> None:
    args = arguments(__doc__, batch=4).parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args)
    inputs = make_inputs(model, args.batch)
    exits = spread_exits(args.batch, args.layers)
    freezes = [k // 2 for k in exits]
    rows = [one_row(inputs, row) for row in range(args.batch)]
    variants = {
        "stock": prefill_pass(model, inputs),
        "ragged batch": prefill_pass(model, inputs, oracle(exits)),
        "rows one after the other": in_order(
            [prefill_pass(model, row, oracle([k])) for row, k in zip(rows, exits, strict=True)]
        ),
        "rest": rest_pass(model, inputs),
        "layers": ideal_layers(model, exits),
        "mixed batch": prefill_pass(model, inputs, oracle(exits, freezes)),
        "mixed layers": ideal_layers(model, exits, freezes=freezes),
    }
    setting = setting_of(args, rounds=args.rounds, exit_layers=exits, freeze_layers=freezes, clock=args.clock)
    report = Report(setting, args.json)
    timers = {name: timed(run, model.device, args.clock) for name, run in variants.items()}
    times = interleaved(timers, args.rounds)
    ratios = {
        "ragged / ideal time": ratio(times, ["ragged batch"], ["rest", "layers"], "at most 1.15"),
        "ragged / rows one after the other": ratio(times, ["ragged batch"], ["rows one after the other"]),
        "ragged / stock time": ratio(times, ["ragged batch"], ["stock"]),
        "mixed / ideal time": ratio(times, ["mixed batch"], ["rest", "mixed layers"], "at most 1.15"),
        "mixed / stock time": ratio(times, ["mixed batch"], ["stock"]),
    }
    report.add(times, ratios)

    unequal = [make_inputs(model, 1, MORE_TEXT * row) for row in range(args.batch)]
    batch = padded(unequal)
    stock = prefill_bytes(model, batch, [args.layers] * args.batch)
    counted = {
        "FLOPs / sum of its rows": (over_rows(prefill_flops, model, inputs, rows, exits), "at most 1.02"),
        "KV bytes / sum of its rows": (over_rows(prefill_bytes, model, inputs, rows, exits), "at most 1.05"),
        "unequal rows: KV bytes / sum of its rows": (
            over_rows(prefill_bytes, model, batch, unequal, exits),
            "",
        ),
        "unequal rows: KV bytes / stock": (prefill_bytes(model, batch, exits) / stock, ""),
        "unequal rows: FLOPs / padded stock": (over_padded_stock(model, batch, exits), "at most 1.00"),
    }
    for name, (value, target) in counted.items():
        print(f"{name:40} {value:6.3f} {'':23} {target}".rstrip())


def over_rows(
    cost: Callable[[torch.nn.Module, Inputs, Sequence[int]], int],
    model: torch.nn.Module,
    inputs: Inputs,
    rows: Sequence[Inputs],
    exits: Sequence[int],
) -> float:
    """A batch's cost over that of its rows alone."""
    return cost(model, inputs, exits) / sum(cost(model, row, [k]) for row, k in zip(rows, exits, strict=True))


if __name__ == "__main__":
    main()

"""A batch whose rows leave at different layers: FLOPs and KV bytes against the sum of its rows, and time.

Rows leave evenly spread over the layers, the last one never; all rows are equally long (LLaVA proportions).

    python benchmarks/ragged.py --hidden 512 --layers 8 --batch 4 --rounds 20
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from prefill import (
    PREFIX,
    PROMPT,
    VISUAL,
    arguments,
    build_model,
    layer_pass,
    make_inputs,
    measure,
    prefill_pass,
    ratio,
    report,
    rest_pass,
    setting_of,
)
from torch.utils.flop_counter import FlopCounterMode

import dyvte
from dyvte.policies import OraclePolicy

Inputs = dict[str, torch.Tensor]


def oracle(exits: list[int]) -> dyvte.VisualExit:
    return dyvte.VisualExit.from_policy(OraclePolicy(exits))


def one_row(inputs: Inputs, row: int) -> Inputs:
    return {name: value[row : row + 1] for name, value in inputs.items()}


def flops(model: torch.nn.Module, inputs: Inputs, exits: list[int]) -> int:
    """Of a prefill; with eager attention, whose products the counter knows."""
    config = model.get_decoder().config
    attention, config._attn_implementation = config._attn_implementation, "eager"
    try:
        with torch.inference_mode(), oracle(exits)(model), FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
    finally:
        config._attn_implementation = attention
    return counter.get_total_flops()


def kv_bytes(model: torch.nn.Module, inputs: Inputs, exits: list[int]) -> int:
    """Real size of all K/V tensors after a prefill."""
    with torch.inference_mode(), oracle(exits)(model):
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    return sum(
        states.untyped_storage().nbytes() for layer in cache.layers for states in (layer.keys, layer.values)
    )


def unequal_rows(batch: int, device: torch.device, dtype: torch.dtype) -> list[Inputs]:
    """One prompt after the other, each 20 text tokens longer than the one before."""
    rows = []
    for row in range(batch):
        inputs = make_inputs(1, dtype)
        more = torch.randint(10, 1000, (1, 20 * row))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        rows.append({name: value.to(device) for name, value in inputs.items()})
    return rows


def padded(rows: list[Inputs]) -> Inputs:
    """The rows as one left-padded batch."""
    width = max(row["input_ids"].shape[1] for row in rows)
    pad = torch.nn.functional.pad
    lines = {
        name: torch.cat([pad(row[name], (width - row[name].shape[1], 0)) for row in rows])
        for name in ("input_ids", "attention_mask")
    }
    return {**lines, "pixel_values": torch.cat([row["pixel_values"] for row in rows])}


def ideal_pass(model: torch.nn.Module, exits: list[int]) -> Callable[[], None]:
    """Each layer called directly: once on the rows that still see the image, once on the others' text."""
    parts = []
    for index in range(len(model.get_decoder().layers)):
        full = sum(k > index for k in exits)
        for rows, tokens in ((full, PREFIX + VISUAL + PROMPT), (len(exits) - full, PREFIX + PROMPT)):
            if rows:
                parts.append(layer_pass(model, rows, tokens, index, index + 1))

    def run() -> None:
        for part in parts:
            part()

    return run


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = build_model(args.hidden, args.layers, dtype, args.attention).to(device)
    inputs = {name: value.to(device) for name, value in make_inputs(args.batch, dtype).items()}
    exits = [max(1, args.layers * (row + 1) // args.batch) for row in range(args.batch)]

    def alone() -> None:
        for row, k in enumerate(exits):
            prefill_pass(model, one_row(inputs, row), oracle([k]))()

    variants = {
        "stock": prefill_pass(model, inputs),
        "ragged batch": prefill_pass(model, inputs, oracle(exits)),
        "rows one after the other": alone,
        "rest": rest_pass(model, inputs),
        "layers": ideal_pass(model, exits),
    }
    times = measure(variants, args.rounds, device)
    figures = {
        "ragged / ideal time": ratio(times, ["ragged batch"], ["rest", "layers"]),
        "ragged / rows one after the other": ratio(times, ["ragged batch"], ["rows one after the other"]),
        "ragged / stock time": ratio(times, ["ragged batch"], ["stock"]),
    }
    setting = {
        **setting_of(args, device),
        "tokens": f"{PREFIX} + {VISUAL} visual + {PROMPT} per row, {args.batch} rows",
        "exit layers": str(exits),
    }
    report(setting, times, figures, args.json)

    rows = [one_row(inputs, row) for row in range(args.batch)]
    print(
        f"\nFLOPs of the batch / sum of its rows      {_over_rows(flops, model, inputs, rows, exits):6.3f}\n"
        f"KV bytes of the batch / sum of its rows   {_over_rows(kv_bytes, model, inputs, rows, exits):6.3f}"
    )
    rows = unequal_rows(args.batch, device, dtype)
    batch = padded(rows)
    stock = kv_bytes(model, batch, [args.layers] * args.batch)
    print(
        f"the same, rows of different length        {_over_rows(kv_bytes, model, batch, rows, exits):6.3f}\n"
        f"KV bytes of that batch / stock            {kv_bytes(model, batch, exits) / stock:6.3f}"
    )


def _over_rows(
    cost: Callable[..., int], model: torch.nn.Module, inputs: Inputs, rows: list[Inputs], exits: list[int]
) -> float:
    return cost(model, inputs, exits) / sum(cost(model, row, [k]) for row, k in zip(rows, exits, strict=True))


if __name__ == "__main__":
    main()

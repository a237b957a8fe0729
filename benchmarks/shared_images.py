"""Many questions about one image: FLOPs and time of a prefill that computes the image once.

A batch of questions, 32 by default, shows one image in LLaVA-1.5's proportions. FLOPs are those that torch
counts in the very runs, attention, vision tower and output head included, over those of the same batch
without a store; and over the image once to its deepest exit and the texts alone. Time ratios come from
interleaved runs: with a fresh store, whose image is computed, and with one that knows it.

    python benchmarks/shared_images.py --hidden 1024 --layers 8 --rounds 6
    python benchmarks/shared_images.py --flops-only
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from common import PREFIX, PROMPT, VISUAL, Report, arguments, interleaved, ratio, setting_of, timed
from passes import prefill
from random_llava import Inputs, build_model, make_inputs, oracle, spread_exits
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dyvte


def shared_pass(
    model: torch.nn.Module,
    inputs: Inputs,
    exits: dyvte.VisualExit,
    store: Callable[[], dyvte.ImageStore | None],
) -> Callable[[], None]:
    """A prefill with the store of the moment."""

    def run() -> None:
        with exits(model, images=store()):
            prefill(model, inputs)

    return run


@torch.inference_mode()
def flops(run: Callable[[], None]) -> int:
    """What torch counts; of attention functions it counts the plain one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def ideal_flops(model: torch.nn.Module, exits: Sequence[int]) -> int:
    """The image once, to its deepest exit, and the texts; by formula, and the vision tower as counted."""
    config = model.get_decoder().config
    size, layers = config.hidden_size, config.num_hidden_layers
    weights = 2 * (4 * size * size + 3 * size * config.intermediate_size)
    total = 2 * size * config.vocab_size * len(exits)
    for layer in range(layers):
        # Of the last layer that is read keys and values are enough, queries and what follows are not needed.
        deepest = layer < max(exits)
        begins = PREFIX + VISUAL if deepest else PREFIX
        total += begins * weights + 4 * size * (PREFIX * PREFIX + (VISUAL * begins if deepest else 0))
        for k in exits:
            seen = PREFIX + PROMPT + (VISUAL if layer < k else 0)
            total += PROMPT * weights + 4 * size * PROMPT * seen
    pixels = torch.zeros(1, 3, 336, 336, dtype=model.dtype, device=model.device)
    return total + flops(lambda: model.model.get_image_features(pixels))


def main() -> None:
    parser = arguments(__doc__, batch=32)
    parser.add_argument("--flops-only", action="store_true", help="no timing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args)
    inputs = make_inputs(model, args.batch)
    inputs["pixel_values"] = inputs["pixel_values"][:1].repeat(args.batch, 1, 1, 1)
    # One system prompt before the image.
    inputs["input_ids"][:, :PREFIX] = inputs["input_ids"][:1, :PREFIX].clone()
    schedules = {
        "never": [args.layers] * args.batch,
        "all after L/2": [args.layers // 2] * args.batch,
        "spread over the layers": spread_exits(args.batch, args.layers),
    }
    report = Report(setting_of(args, rounds=args.rounds), args.json)
    print(f"{'FLOPs':28} {'shared / alone':>15} {'shared / ideal':>15} {'known / alone':>15}")
    for name, exits in schedules.items():
        store = dyvte.ImageStore()
        passes = {
            "alone": shared_pass(model, inputs, oracle(exits), lambda: None),
            "shared": shared_pass(model, inputs, oracle(exits), dyvte.ImageStore),
            "known": shared_pass(model, inputs, oracle(exits), partial(_same, store)),
        }
        with torch.inference_mode():
            passes["known"]()
        alone, shared, known = map(flops, passes.values())
        ideal = ideal_flops(model, exits)
        print(f"{name:28} {shared / alone:15.4f} {shared / ideal:15.4f} {known / alone:15.4f}", flush=True)
        if args.flops_only:
            continue
        times = interleaved({n: timed(run, model.device) for n, run in passes.items()}, args.rounds)
        limit = f"at most {1.15 * shared / alone:.3f}"
        report.add(
            {f"{name}, {key}": values for key, values in times.items()},
            {
                f"{name}, shared / alone": ratio(times, ["shared"], ["alone"], limit),
                f"{name}, known / alone": ratio(times, ["known"], ["alone"]),
            },
        )


def _same(store: dyvte.ImageStore) -> dyvte.ImageStore:
    return store


if __name__ == "__main__":
    main()

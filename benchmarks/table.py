"""The README's table: time to first token, decode time per token, KV bytes, peak memory; as markdown.

Full model, VTW (all rows leave after L/2) and DyVTE (gates 1..L/2 are asked, the last sends all rows away),
timed side by side in one process; memory in a process for each. In brackets: over the full model, the
median of per-round ratios.

    python benchmarks/table.py --hidden 1024 --layers 8
"""

from __future__ import annotations

import statistics

import torch
from common import arguments, interleaved, ratio, setting_of, timed, write_json
from memory import VARIANTS, exits_of, measure_apart
from passes import Decoding, prefill_pass
from random_llava import build_model, make_inputs

HEAD = """| | time to first token | decode, per token | KV cache | peak memory above the model |
|---|---|---|---|---|"""


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    k = args.layers // 2
    memory = measure_apart(args)
    model = build_model(args)
    inputs = make_inputs(model, args.batch)
    exits = {name: exits_of(name, model, k) for name in VARIANTS}
    first = interleaved(
        {n: timed(prefill_pass(model, inputs, one), model.device) for n, one in exits.items()}, args.rounds
    )
    each = interleaved({n: Decoding(model, inputs, one).seconds for n, one in exits.items()}, args.rounds)
    labels = {
        "full": "full model",
        "VTW": f"VTW, K = {k} of {args.layers}",
        "DyVTE": f"DyVTE, gates that fire at {k}",
    }
    print(HEAD)
    for name, label in labels.items():
        cells = [_time(times, name) for times in (first, each)]
        cells += [_bytes(memory, name, what) for what in ("kv", "peak")]
        print(f"| {label} | {' | '.join(cells)} |")
    setting = setting_of(args, rounds=args.rounds)
    print(f"\n{'; '.join(f'{name}: {value}' for name, value in setting.items())}.")
    seconds = {"first token": first, "each token": each}
    write_json(args.json, {"setting": setting, "seconds": seconds, "bytes": memory})


def _time(times: dict[str, list[float]], name: str) -> str:
    text = f"{1e3 * statistics.median(times[name]):.1f} ms"
    return text if name == "full" else f"{text} ({ratio(times, [name], ['full']).median:.3f})"


def _bytes(memory: dict[str, dict[str, int]], name: str, what: str) -> str:
    text = f"{memory[name][what] / 2**20:.1f} MiB"
    return text if name == "full" else f"{text} ({memory[name][what] / memory['full'][what]:.3f})"


if __name__ == "__main__":
    main()

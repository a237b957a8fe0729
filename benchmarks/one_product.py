"""Keys and values of a frozen image for all deeper layers: layer by layer, or from one product.

A frozen state has one root mean square for all layers, so with each layer's norm folded into its projections
the keys and values of every deeper layer are one matrix product. `kept` holds the folded weights beside the
model's own, `folded anew` makes them in each prefill. Rotary embeddings are left out: they are a layer's own
either way.

    python benchmarks/one_product.py --hidden 1024 --layers 8                  # six frozen layers behind two
    python benchmarks/one_product.py --hidden 1024 --layers 8 --key-heads 4
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import VISUAL, Report, arguments, interleaved, ratio, setting_of, timed
from random_llava import build_model
from torch.nn.functional import linear


def layer_by_layer(layers: list[torch.nn.Module], visual: torch.Tensor) -> list[torch.Tensor]:
    """As the runtime does it, without what surrounds it."""
    found = []
    for layer in layers:
        normed = layer.input_layernorm(visual)
        found += [layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)]
    return found


def folded(layers: list[torch.nn.Module]) -> torch.Tensor:
    """All projections below one another, each layer's norm in its columns."""
    return torch.cat(
        [
            projection.weight * layer.input_layernorm.weight
            for layer in layers
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        ]
    )


def at_once(weights: torch.Tensor, visual: torch.Tensor, eps: float, size: int) -> list[torch.Tensor]:
    """One product of the normalised states."""
    scale = torch.rsqrt(visual.float().pow(2).mean(-1, keepdim=True) + eps)
    return list(linear((visual.float() * scale).to(visual.dtype), weights).split(size, -1))


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args)
    decoder = model.get_decoder()
    layers = list(decoder.layers[args.layers // 4 :])
    for layer in layers:  # all ones in a new model
        torch.nn.init.uniform_(layer.input_layernorm.weight, 0.5, 1.5)
    visual = torch.randn(args.batch, VISUAL, args.hidden, dtype=model.dtype, device=model.device)
    eps, size = decoder.config.rms_norm_eps, layers[0].self_attn.k_proj.out_features
    with torch.inference_mode():
        kept = folded(layers)
        pairs = zip(layer_by_layer(layers, visual), at_once(kept, visual, eps, size), strict=True)
        print(f"largest difference {max(float((a - b).abs().max()) for a, b in pairs):.1e}\n")
    runs: dict[str, Callable[[], object]] = {
        "layer by layer": lambda: layer_by_layer(layers, visual),
        "one product, kept": lambda: at_once(kept, visual, eps, size),
        "one product, folded anew": lambda: at_once(folded(layers), visual, eps, size),
    }
    report = Report(setting_of(args, rounds=args.rounds, frozen=len(layers), clock=args.clock), args.json)
    timers = {name: timed(run, model.device, args.clock) for name, run in runs.items()}
    times = interleaved(timers, args.rounds)
    first, *others = runs
    report.add(times, {f"{name} / {first}": ratio(times, [name], [first]) for name in others})


if __name__ == "__main__":
    main()

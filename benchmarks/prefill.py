"""Prefill time behind an exit, against the full model and against the ideal, in one process.

LLaVA proportions (35 tokens before the image, 576 visual, 40 after), random weights. Every ratio comes from
interleaved runs: in each round all variants run once, in a shuffled order, and medians of the per-round
ratios are reported, so that a machine that slows down for a while slows all of them.

The ideal is what the layers alone cost: k layers on all tokens and L-k layers on text tokens, called
directly on the model's own layers, plus the rest of the model (vision tower, embedding, norm, head).

    python benchmarks/prefill.py --hidden 512 --layers 8 --rounds 20
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import dyvte
from dyvte.gates import GateConfig, GateStack
from dyvte.policies import OraclePolicy

PREFIX, VISUAL, PROMPT = 35, 576, 40
IMAGE_ID = 5


def build_model(hidden: int, layers: int, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    """A LLaVA of the asked decoder size behind a vision tower too small to matter."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=336,
        patch_size=14,
    )
    heads = max(1, hidden // 64)
    text = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=int(hidden * 11008 / 4096) // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        image_seq_length=VISUAL,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).to(dtype).eval().requires_grad_(False)


def make_inputs(batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A batch of equal rows with random text and random pixels."""
    ids = torch.randint(10, 1000, (batch, PREFIX + VISUAL + PROMPT))
    ids[:, PREFIX : PREFIX + VISUAL] = IMAGE_ID
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, 336, 336, dtype=dtype),
    }


def layer_pass(model: torch.nn.Module, batch: int, tokens: int, first: int, last: int) -> Callable[[], None]:
    """Layers first..last-1 called directly on `tokens` tokens, with a K/V cache."""
    decoder = model.get_decoder()
    states = torch.randn(batch, tokens, decoder.config.hidden_size, dtype=model.dtype, device=model.device)
    positions = torch.arange(tokens, device=model.device)[None]
    rotary = decoder.rotary_emb(states, positions)
    mask = transformers.masking_utils.create_causal_mask(decoder.config, states, None, None)

    def run() -> None:
        cache = transformers.DynamicCache(config=decoder.config)
        hidden = states
        for layer in decoder.layers[first:last]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary,
            )

    return run


def rest_pass(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """The model without its decoder layers."""
    config = model.get_decoder().config

    def run() -> None:
        layers, config.num_hidden_layers = config.num_hidden_layers, 0
        try:
            model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            config.num_hidden_layers = layers

    return run


def prefill_pass(model: torch.nn.Module, inputs: dict[str, torch.Tensor], exits=None) -> Callable[[], None]:
    """A prefill with a K/V cache, stock or inside an exit block."""

    def stock() -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)

    def behind_exit() -> None:
        with exits(model):
            model(**inputs, use_cache=True, logits_to_keep=1)

    return stock if exits is None else behind_exit


def silent_gates(model: torch.nn.Module, layers: int, hidden: int) -> dyvte.VisualExit:
    """All gates run and none fires."""
    config = GateConfig(num_layers=layers, hidden_size=hidden, threshold=1.0)
    return dyvte.VisualExit(GateStack.init(config).to(model.device))


def measure(
    variants: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each variant in each round, order shuffled within a round; one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    for round_index in range(rounds + 1):
        names = list(variants)
        order.shuffle(names)
        for name in names:
            start = _now(device)
            with torch.inference_mode():
                variants[name]()
            if round_index:
                times[name].append(_now(device) - start)
    return times


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def ratio(times: dict[str, list[float]], over: list[str], under: list[str]) -> tuple[float, float, float]:
    """Median and 95 % bounds (order statistics) of the per-round ratio of two sums of variants."""
    top = [sum(values) for values in zip(*(times[n] for n in over), strict=True)]
    bottom = [sum(values) for values in zip(*(times[n] for n in under), strict=True)]
    ratios = sorted(a / b for a, b in zip(top, bottom, strict=True))
    # Ranks of the binomial(n, 1/2) interval for a median, normal approximation.
    half = 0.98 * len(ratios) ** 0.5
    low = max(0, int(len(ratios) / 2 - half))
    high = min(len(ratios) - 1, int(len(ratios) / 2 + half))
    return statistics.median(ratios), ratios[low], ratios[high]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="also write the figures to this file")
    return parser


def setting_of(args: argparse.Namespace, device: torch.device) -> dict[str, str]:
    """Machine, versions and model."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} logical cores, {args.threads} threads",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"dyvte {dyvte.__version__}",
        "model": f"{args.layers} layers, hidden {args.hidden}, {args.dtype}, {args.attention}",
        "rounds": str(args.rounds),
    }


def report(
    setting: dict[str, str],
    times: dict[str, list[float]],
    figures: dict[str, tuple[float, float, float]],
    path: str | None,
) -> None:
    """Print, and write as JSON where asked."""
    for name, value in setting.items():
        print(f"{name:16} {value}")
    print()
    for name, values in times.items():
        print(f"{name:32} {1e3 * statistics.median(values):9.2f} ms")
    print()
    for name, (median, low, high) in figures.items():
        print(f"{name:40} {median:6.3f}   95 % of the median: {low:.3f} .. {high:.3f}")
    if path:
        with open(path, "w", encoding="utf-8") as stream:
            json.dump({"setting": setting, "figures": figures, "seconds": times}, stream, indent=2)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--exit-layer", type=int, help="default: half of the layers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    exit_layer = args.layers // 2 if args.exit_layer is None else args.exit_layer

    model = build_model(args.hidden, args.layers, dtype, args.attention).to(device)
    inputs = {name: value.to(device) for name, value in make_inputs(args.batch, dtype).items()}
    tokens, text = PREFIX + VISUAL + PROMPT, PREFIX + PROMPT
    variants = {
        "stock": prefill_pass(model, inputs),
        "exit": prefill_pass(model, inputs, dyvte.VisualExit.fixed(exit_layer)),
        "exit that never fires": prefill_pass(model, inputs, dyvte.VisualExit.fixed(args.layers)),
        "silent gates": prefill_pass(model, inputs, silent_gates(model, args.layers, args.hidden)),
        "rest": rest_pass(model, inputs),
        "full layers": layer_pass(model, args.batch, tokens, 0, exit_layer),
        "text layers": layer_pass(model, args.batch, text, exit_layer, args.layers),
    }
    if args.batch > 1:
        spread = [exit_layer if row % 2 else args.layers for row in range(args.batch)]
        policy = dyvte.VisualExit.from_policy(OraclePolicy(spread))
        variants["half of the rows exit"] = prefill_pass(model, inputs, policy)
    times = measure(variants, args.rounds, device)

    ideal = ["rest", "full layers", "text layers"]
    figures = {
        "exit / stock": ratio(times, ["exit"], ["stock"]),
        "ideal / stock": ratio(times, ideal, ["stock"]),
        "exit / ideal": ratio(times, ["exit"], ideal),
        "exit that never fires / stock": ratio(times, ["exit that never fires"], ["stock"]),
        "silent gates / stock": ratio(times, ["silent gates"], ["stock"]),
    }
    if args.batch > 1:
        figures["half of the rows exit / stock"] = ratio(times, ["half of the rows exit"], ["stock"])
    setting = {
        **setting_of(args, device),
        "tokens": f"{PREFIX} + {VISUAL} visual + {PROMPT}, batch {args.batch}",
        "exit layer": str(exit_layer),
        "one full layer": f"{1e3 * statistics.median(times['full layers']) / max(1, exit_layer):.1f} ms",
    }
    report(setting, times, figures, args.json)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


if __name__ == "__main__":
    main()

"""What all benchmarks share: a random LLaVA in the published proportions, variants, interleaved timing.

Proportions: 35 tokens before the image, 576 visual tokens, 40 after. Weights and inputs are random.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import dyvte
from dyvte.gates import GateConfig, GateStack
from dyvte.policies import OraclePolicy
from dyvte.progress import progress

PREFIX, VISUAL, PROMPT = 35, 576, 40
TOKENS, TEXT = PREFIX + VISUAL + PROMPT, PREFIX + PROMPT
IMAGE_ID, FILLER_ID = 5, 9

Inputs = dict[str, torch.Tensor]
Times = dict[str, list[float]]


# -- model, inputs, exits ----------------------------------------------------------------------------------
def build_model(args: argparse.Namespace) -> torch.nn.Module:
    """A LLaVA of the asked decoder size behind a vision tower too small to matter."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=336,
        patch_size=14,
    )
    heads = max(1, args.hidden // (128 if args.hidden >= 4096 else 64))
    text = transformers.LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=int(args.hidden * 11008 / 4096) // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=args.key_heads or heads,
        max_position_embeddings=4096,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        image_seq_length=VISUAL,
    )
    config._attn_implementation = args.attention
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).to(getattr(torch, args.dtype))
    return model.eval().requires_grad_(False).to(args.device)


def make_inputs(model: torch.nn.Module, rows: int, more_text: int = 0) -> Inputs:
    """Equal rows of random text and pixels; `more_text` tokens are added behind."""
    ids = torch.randint(10, model.config.text_config.vocab_size, (rows, TOKENS + more_text))
    ids[:, PREFIX : PREFIX + VISUAL] = IMAGE_ID
    pixels = torch.randn(rows, 3, 336, 336, dtype=model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: value.to(model.device) for name, value in inputs.items()}


def oracle(exits: Sequence[int], freezes: Sequence[int] | None = None) -> dyvte.VisualExit:
    """Each row freezes and leaves where it is told; without freezes it is updated until it leaves."""
    return dyvte.VisualExit.from_policy(OraclePolicy(list(exits), None if freezes is None else list(freezes)))


def spread_exits(rows: int, layers: int) -> list[int]:
    """Exits spread evenly over the layers; the last row never leaves."""
    return [max(1, layers * (row + 1) // rows) for row in range(rows)]


def silent_gates(model: torch.nn.Module, *, freeze_head: bool = False) -> dyvte.VisualExit:
    """All gates run and none fires."""
    never = {"freeze_head": True, "freeze_threshold": 1.0} if freeze_head else {}
    return _gates(model, threshold=1.0, **never)


def gates_that_fire_at(k: int, model: torch.nn.Module) -> dyvte.VisualExit:
    """Gates 1..k are asked, and gate k sends every row away."""
    layers = model.get_decoder().config.num_hidden_layers
    return _gates(model, offsets=tuple(-1e4 if layer < k else 1e4 for layer in range(1, layers + 1)))


def _gates(model: torch.nn.Module, **fields: Any) -> dyvte.VisualExit:
    text = model.get_decoder().config
    config = GateConfig(num_layers=text.num_hidden_layers, hidden_size=text.hidden_size, **fields)
    return dyvte.VisualExit(GateStack.init(config).to(model.device))


def inside(model: torch.nn.Module, exits: dyvte.VisualExit | None) -> Any:
    """The exits' block, or none."""
    return nullcontext() if exits is None else exits(model)


def schedule(text: str) -> tuple[int, int]:
    """``F:K``, or ``K`` where nothing is frozen before it leaves."""
    match = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
    if match is None or int(match[1] or match[2]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected F:K with F <= K, or K")
    return int(match[1] or match[2]), int(match[2])


# -- what is timed -----------------------------------------------------------------------------------------
def prefill(model: torch.nn.Module, inputs: Inputs) -> Any:
    """One prefill up to the first token's logits; its cache."""
    return model(**inputs, use_cache=True, logits_to_keep=1).past_key_values


def prefill_pass(
    model: torch.nn.Module, inputs: Inputs, exits: dyvte.VisualExit | None = None
) -> Callable[[], None]:
    """A prefill with a K/V cache, stock or inside an exit block."""

    def run() -> None:
        with inside(model, exits):
            prefill(model, inputs)

    return run


def layer_pass(model: torch.nn.Module, rows: int, tokens: int, first: int, last: int) -> Callable[[], None]:
    """Layers first..last-1 called directly on `tokens` tokens, with a K/V cache."""
    decoder = model.get_decoder()
    states = torch.randn(rows, tokens, decoder.config.hidden_size, dtype=model.dtype, device=model.device)
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


class _Inserting:
    """A cache that puts an image's keys and values between those of the text before and behind it."""

    def __init__(self, cache: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.cache, self.visual = cache, (keys, values)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        whole = [
            torch.cat((text[:, :, :PREFIX], visual, text[:, :, PREFIX:]), 2)
            for text, visual in zip((keys, values), self.visual, strict=True)
        ]
        return self.cache.update(*whole, *more)


def frozen_pass(model: torch.nn.Module, rows: int, first: int, last: int) -> Callable[[], None]:
    """Layers first..last-1 called directly on the text, with a K/V cache; of the image, which never changes,
    each layer's input norm and its key and value projections alone."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    decoder, device = model.get_decoder(), model.device
    text, visual = (
        torch.randn(rows, tokens, decoder.config.hidden_size, dtype=model.dtype, device=device)
        for tokens in (TEXT, VISUAL)
    )
    everywhere = torch.arange(TOKENS, device=device)[None]
    is_visual = (everywhere >= PREFIX) & (everywhere < PREFIX + VISUAL)
    positions = everywhere[~is_visual][None]
    cos, sin = decoder.rotary_emb(visual, everywhere[is_visual][None])
    rotary = decoder.rotary_emb(text, positions)
    mask = (everywhere <= positions[0, :, None])[None, None]
    heads = (rows, VISUAL, -1, decoder.layers[0].self_attn.head_dim)

    def run() -> None:
        cache = transformers.DynamicCache(config=decoder.config)
        hidden = text
        for layer in decoder.layers[first:last]:
            attention, normed = layer.self_attn, layer.input_layernorm(visual)
            keys, values = (
                one(normed).view(heads).transpose(1, 2) for one in (attention.k_proj, attention.v_proj)
            )
            _, keys = apply_rotary_pos_emb(keys[:, :1], keys, cos, sin)
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=_Inserting(cache, keys, values),
                use_cache=True,
                position_embeddings=rotary,
            )

    return run


def rest_pass(model: torch.nn.Module, inputs: Inputs) -> Callable[[], None]:
    """The model without its decoder layers."""
    config = model.get_decoder().config

    def run() -> None:
        layers, config.num_hidden_layers = config.num_hidden_layers, 0
        try:
            model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            config.num_hidden_layers = layers

    return run


def in_order(passes: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """One pass after the other."""

    def run() -> None:
        for one in passes:
            one()

    return run


def kv_bytes(cache: Any) -> int:
    """Real size of all K/V tensors."""
    return sum(s.untyped_storage().nbytes() for layer in cache.layers for s in (layer.keys, layer.values))


class Decoding:
    """Decode steps on one filled cache, which is cut back after each measurement."""

    STEPS = 8

    def __init__(self, model: torch.nn.Module, inputs: Inputs, exits: dyvte.VisualExit | None) -> None:
        self.model, self.exits = model, exits
        self.token = torch.full((len(inputs["input_ids"]), 1), FILLER_ID, device=model.device)
        with inside(model, exits):
            self.cache = prefill(model, inputs)

    def step(self) -> None:
        """One token for each row; call inside the block."""
        self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)

    def seconds(self) -> float:
        """Of one step: the mean of several after one that is not counted."""
        with inside(self.model, self.exits):
            self.step()
            start = now(self.model.device)
            for _ in range(self.STEPS):
                self.step()
            seconds = now(self.model.device) - start
        self.cache.crop(-self.STEPS - 1)
        return seconds / self.STEPS


def now(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(run: Callable[[], None], device: torch.device, clock: str = "wall") -> Callable[[], float]:
    """The seconds that `run` takes, or (clock "processor") those that this process's threads compute."""

    def seconds() -> float:
        start = _on(clock, device)
        run()
        return _on(clock, device) - start

    return seconds


def _on(clock: str, device: torch.device) -> float:
    wall = now(device)
    return time.process_time() if clock == "processor" else wall


def interleaved(variants: dict[str, Callable[[], float]], rounds: int, seed: int = 0) -> Times:
    """Seconds of each variant in each round, in a new order every round; the first round is not counted."""
    times: Times = {name: [] for name in variants}
    order = random.Random(seed)
    keep_memory()
    with progress((rounds + 1) * len(variants), "timing", "run") as advance:
        for round_index in range(rounds + 1):
            for name in order.sample(list(variants), len(variants)):
                with torch.inference_mode():
                    seconds = variants[name]()
                if round_index:
                    times[name].append(seconds)
                advance(1)
    return times


def keep_memory() -> bool:
    """Let this process keep what it frees, where the C library can (glibc): else each pass gives some of its
    memory back to the system and takes it again, more or less by how the heap happens to lie, and that is up
    to 5 % of a pass's time. True where it could."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: the largest that glibc takes.
    return bool(mallopt(-1, 2**31 - 1)) and bool(mallopt(-3, 32 * 2**20))


# -- ratios ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ratio:
    """A median of ratios with its 95 % bounds (NaN where there are too few), and what is aimed at."""

    median: float
    low: float
    high: float
    target: str = ""


def ratio(times: Times, over: Sequence[str], under: Sequence[str], target: str = "") -> Ratio:
    """The per-round ratio of two sums of variants."""
    top = [sum(values) for values in zip(*(times[n] for n in over), strict=True)]
    bottom = [sum(values) for values in zip(*(times[n] for n in under), strict=True)]
    ratios = sorted(a / b for a, b in zip(top, bottom, strict=True))
    rank = median_rank(len(ratios))
    low, high = (ratios[rank - 1], ratios[-rank]) if rank else (math.nan, math.nan)
    return Ratio(statistics.median(ratios), low, high, target)


def median_rank(count: int) -> int:
    """r such that the r-th smallest and r-th largest of `count` values bound the median at 95 %; 0: none.

    Order statistics: the number of values below the median is binomial(count, 1/2). 20 values give r = 6.
    """
    below, rank = 0.0, 0
    while True:
        below += math.comb(count, rank) / 2**count
        if 2 * below > 0.05:
            return rank
        rank += 1


def arguments(description: str | None, *, batch: int = 1) -> argparse.ArgumentParser:
    """Options that every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--key-heads", type=int, help="heads of keys and values, default: as many as queries")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: seconds of this process's threads, for a machine that is not quiet (CPU alone)",
    )
    parser.add_argument("--json", help="also write the ratios to this file")
    return parser


def setting_of(args: argparse.Namespace, **more: object) -> dict[str, str]:
    """Machine, versions and sizes."""
    device = torch.device(args.device)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} logical cores, {args.threads} threads",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"dyvte {dyvte.__version__}",
        "model": f"{args.layers} layers, hidden {args.hidden}, {args.dtype}, {args.attention}"
        + (f", {args.key_heads} heads of keys" if getattr(args, "key_heads", None) else ""),
        "tokens": f"{PREFIX} + {VISUAL} visual + {PROMPT} per row, batch {args.batch}",
        **{name: str(value) for name, value in more.items()},
    }


class Report:
    """Prints what a benchmark finds as it comes, and keeps it as JSON where asked: a long one may be killed.

    Parameters
    ----------
    setting
        Machine, versions and sizes; printed first.
    path
        JSON file of all that was found so far, or None.
    """

    def __init__(self, setting: dict[str, str], path: str | None) -> None:
        self.path = path
        self.found: dict[str, Any] = {"setting": setting, "ratios": {}, "seconds": {}}
        print_setting(setting)

    def add(self, times: Times, ratios: dict[str, Ratio]) -> None:
        """Print medians and ratios, and keep them."""
        for name, values in times.items():
            print(f"{name:34} {1e3 * statistics.median(values):9.2f} ms")
        print(f"\n{'median of ratios':40} {'':6}   95 % bounds        target")
        for name, one in ratios.items():
            print(f"{name:40} {one.median:6.3f}   {one.low:.3f} .. {one.high:.3f}     {one.target}".rstrip())
        print(flush=True)
        self.found["seconds"] |= times
        self.found["ratios"] |= {name: vars(one) for name, one in ratios.items()}
        write_json(self.path, self.found)


def print_setting(setting: dict[str, str]) -> None:
    """One line each."""
    for name, value in setting.items():
        print(f"{name:16} {value}")
    print(flush=True)


def write_json(path: str | None, content: dict[str, Any]) -> None:
    """Where asked."""
    if path:
        with open(path, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=2)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"

"""What a label costs: the one-pass teacher against a step of DyVTE's reference trainer.

A step of the reference labels each sample at one exit layer (`reference_step.py`); one teacher pass labels it
at all L of them, and at K = 0, which is paid for and not counted. Questions about one image share its visual
stream; the reference's trainer computes the image for each. The reference's way is checked against the
teacher's labels, then counted and timed beside it.

FLOPs are exact: the formulas of `dyvte.costs.teacher` at the shape of LLaVA-1.5-7B, after a check that torch
counts the same on the model that is timed. Times are medians of interleaved rounds.

    python benchmarks/labels.py --hidden 256 --layers 32 --rounds 20
    python benchmarks/labels.py --seven-b --device cuda --dtype bfloat16 --batch 8     # throughput table
    python benchmarks/labels.py --hidden 128 --layers 8 --throughput                   # its small form
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from common import (
    IMAGE_ID,
    PREFIX,
    VISUAL,
    Ratio,
    Report,
    arguments,
    interleaved,
    print_setting,
    ratio,
    setting_of,
    timed,
)
from random_llava import build_model
from reference_step import reference_step
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dyvte.backbones.sizes import DecoderShape, decoder_shape
from dyvte.costs.teacher import SampleShape, mean_reference_step_flops, teacher_flops
from dyvte.costs.vision import vision_tower_flops
from dyvte.objectives import reference_labels
from dyvte.teacher import thinned_exits, thinned_freezes, trace_exits
from dyvte.teacher.memory import GIB

SEVEN_B = DecoderShape(
    hidden_size=4096, num_heads=32, num_kv_heads=32, head_dim=128, ffn_sizes_L=(11008,) * 32, vocab_size=32000
)
CLIP_L_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
TEXTS = (25, 50, 75, 150)
TARGETS = {25: 25.0, 75: 18.0}
QUESTIONS = (1, 2, 5, 10, 32)
SHARED_TARGETS = {(25, 10): 62.0}


# --- counts ---


def table(shape: DecoderShape, vision: float, answer: int, every: int) -> list[str]:
    """Labels per FLOP against the reference at several lengths of text; the vision tower on both sides."""
    head = "text after the image  reference, TFLOP a label  teacher, TFLOP a label  ratio   target"
    lines = [f"{head}   ratio with every {every}th exit", "-" * len(head)]
    layers = shape.num_layers
    for text in TEXTS:
        sample = SampleShape(prefix=PREFIX, visual=VISUAL, text=text, answer=answer)
        reference = mean_reference_step_flops(shape, sample) + vision
        whole = (teacher_flops(shape, sample) + vision) / layers
        exits = thinned_exits(layers, every)
        thinned = (teacher_flops(shape, sample, exits) + vision) / sum(k > 0 for k in exits)
        target = f">= {TARGETS[text]:.0f}" if text in TARGETS else ""
        lines.append(
            f"{text:20d}  {reference / 1e12:24.2f}  {whole / 1e12:22.3f}  {reference / whole:5.1f}  "
            f"{target:>7}   {reference / thinned:5.1f}"
        )
    return lines


def shared_table(shape: DecoderShape, vision: float, answer: int) -> list[str]:
    """Labels per FLOP against the reference by questions an image; the vision tower on both sides, here once
    an image."""
    head = "text after the image" + "".join(f"{f'{count} an image':>14}" for count in QUESTIONS)
    lines = [head, "-" * len(head)]
    for text in TEXTS:
        sample = SampleShape(prefix=PREFIX, visual=VISUAL, text=text, answer=answer)
        reference = mean_reference_step_flops(shape, sample) + vision
        cells = []
        for count in QUESTIONS:
            labels = count * shape.num_layers
            ours = (teacher_flops(shape, sample, questions=count) + vision) / labels
            target = SHARED_TARGETS.get((text, count))
            cells.append(f"{reference / ours:.1f}" + (f" (>= {target:.0f})" if target else ""))
        lines.append(f"{text:20d}" + "".join(f"{cell:>14}" for cell in cells))
    return lines


def grid_table(shape: DecoderShape, answer: int, every: int) -> list[str]:
    """What a thinned grid of freeze and exit layers costs, against all exits and no freeze."""
    layers = shape.num_layers
    grid = {"exits": thinned_exits(layers, every), "freezes": thinned_freezes(layers, every)}
    head = "text after the image" + "".join(f"{f'{count} an image':>14}" for count in QUESTIONS)
    lines = [head, "-" * len(head)]
    for text in TEXTS:
        sample = SampleShape(prefix=PREFIX, visual=VISUAL, text=text, answer=answer)
        ratios = [
            teacher_flops(shape, sample, questions=count, **grid)
            / teacher_flops(shape, sample, questions=count)
            for count in QUESTIONS
        ]
        lines.append(f"{text:20d}" + "".join(f"{ratio:14.2f}" for ratio in ratios))
    return lines


def counted(function: Callable[[], object]) -> int:
    """FLOPs that torch counts."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def check_counts(args: argparse.Namespace) -> str:
    """The formulas against torch's counter, on the timed model with plain attention and two layers."""
    args = argparse.Namespace(**{**vars(args), "layers": 2, "attention": "eager", "device": "cpu"})
    args.dtype = "float32"
    model = build_model(args)
    inputs, answer = make_inputs(args, model)
    shape, sample = decoder_shape(model.config), sample_of(args)
    vision = counted(lambda: model.model.get_image_features(pixel_values=inputs["pixel_values"]))
    teacher = counted(lambda: trace_exits(model, inputs, answer)) - vision
    steps = [counted(lambda k=k: reference_step(model, inputs, answer, k)) - vision for k in (1, 2)]
    expected = (
        args.batch * teacher_flops(shape, sample),
        args.batch * mean_reference_step_flops(shape, sample),
    )
    # At k = L nothing is left to double: the reference's head then runs over one half in this implementation.
    steps[1] += args.batch * 2 * sample.total * shape.hidden_size * shape.vocab_size
    found = (teacher, sum(steps) / 2)
    if found != expected:
        raise SystemExit(f"torch counts {found} FLOPs, the formulas say {expected}")
    # The whole batch asks about one image, exits behind a freeze included.
    alike = {name: value[:1].expand_as(value) for name, value in inputs.items()}
    once = counted(lambda: model.model.get_image_features(pixel_values=inputs["pixel_values"][:1]))
    shared = counted(lambda: trace_exits(model, alike, answer, freezes=(0, 1))) - once
    wanted = teacher_flops(shape, sample, freezes=(0, 1), questions=args.batch)
    if shared != wanted:
        raise SystemExit(
            f"torch counts {shared} FLOPs where {args.batch} rows share, the formulas say {wanted}"
        )
    return (
        f"torch counts what the formulas say, on 2 layers: teacher {teacher:,} FLOPs, "
        f"mean step of the reference {found[1]:,.0f}"
    )


def check_labels(model: nn.Module, inputs: dict[str, Tensor], answer: Tensor) -> str:
    """Labels and losses of the reference's steps against one pass, at three layers."""
    trace = trace_exits(model, inputs, answer)
    labels, worst = reference_labels(trace), 0.0
    layers = sorted({1, trace.num_layers // 2, trace.num_layers})
    for k in layers:
        label, exit_loss, _ = reference_step(model, inputs, answer, k)
        worst = max(worst, float((exit_loss - trace.loss[:, k]).abs().max()))
        if k < trace.num_layers and not torch.equal(label.cpu(), labels[:, k - 1].cpu()):
            raise SystemExit(f"the reference labels layer {k} otherwise: {label} against {labels[:, k - 1]}")
    return f"same labels as the reference's steps at layers {layers}; losses within {worst:.1e} nats"


# --- times ---


def sample_of(args: argparse.Namespace) -> SampleShape:
    """What is timed."""
    return SampleShape(prefix=PREFIX, visual=VISUAL, text=args.text, answer=args.answer)


def make_inputs(args: argparse.Namespace, model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of equal rows, and the answer at its end."""
    ids = torch.randint(10, model.config.text_config.vocab_size, (args.batch, sample_of(args).total))
    ids[:, PREFIX : PREFIX + VISUAL] = IMAGE_ID
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, -args.answer :] = True
    pixels = torch.randn(args.batch, 3, 336, 336, dtype=model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: value.to(model.device) for name, value in inputs.items()}, answer.to(model.device)


def compare(args: argparse.Namespace) -> None:
    """Teacher and reference, checked, counted and timed on one model."""
    model, device = build_model(args), torch.device(args.device)
    inputs, answer = make_inputs(args, model)
    print(check_counts(args))
    print(check_labels(model, inputs, answer), end="\n\n")
    exits, middle = thinned_exits(args.layers, args.every), args.layers // 2
    thinned = f"teacher, every {args.every}th exit"
    # The step's cost is linear in the layer: the two in the middle together have the mean over 1..L.
    steps = {f"reference, layer {k}": k for k in (middle, middle + 1)}
    runs: dict[str, Callable[[], object]] = {
        "teacher": lambda: trace_exits(model, inputs, answer),
        thinned: lambda: trace_exits(model, inputs, answer, exits=exits),
    }
    for name, k in steps.items():
        runs[name] = lambda k=k: reference_step(model, inputs, answer, k)
    setting = setting_of(args, tokens=f"{PREFIX} + {VISUAL} visual + {args.text}, batch {args.batch}")
    report = Report(setting, args.json)
    times = interleaved({name: timed(run, device) for name, run in runs.items()}, args.rounds)
    labels = {"teacher": args.layers, thinned: sum(k > 0 for k in exits)}
    ratios = {}
    for name, count in labels.items():
        one = ratio(times, list(steps), [name])
        scale = count / len(steps)
        ratios[f"labels per second, {name} / reference"] = Ratio(
            scale * one.median, scale * one.low, scale * one.high
        )
    shape, sample = decoder_shape(model.config), sample_of(args)
    by_count = args.layers * mean_reference_step_flops(shape, sample) / teacher_flops(shape, sample)
    ratios["labels per FLOP, the same (exact)"] = Ratio(by_count, by_count, by_count)
    report.add(times, ratios)


# --- throughput ---


def seven_b(args: argparse.Namespace) -> nn.Module:
    """A random model of the shape of LLaVA-1.5-7B, vision tower included, made on the device."""
    text = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32064,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **CLIP_L_336},
        text_config=text,
        image_token_id=IMAGE_ID,
    )
    config._attn_implementation = args.attention
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            model = transformers.LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    args.hidden, args.layers = 4096, 32
    return model.eval().requires_grad_(False)


def throughput(args: argparse.Namespace, model: nn.Module) -> Iterator[str]:
    """A line for each length of text, as it comes: samples per second of the teacher pass, peak on a GPU."""
    device = torch.device(args.device)
    yield (
        f"text after the image  samples/s  {args.samples} samples, minutes  ms for a label  "
        "peak beside the weights, GiB"
    )
    for text in args.texts:
        args.text = text
        inputs, answer = make_inputs(args, model)
        budget = None if args.memory_budget is None else int(args.memory_budget * GIB)

        def one(inputs: Any = inputs, answer: Any = answer, budget: int | None = budget) -> None:
            trace_exits(model, inputs, answer, memory_budget=budget)

        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = interleaved({"teacher": timed(one, device)}, args.rounds)["teacher"]
        rate = args.batch / statistics.median(seconds)
        peak = "not measured"
        if device.type == "cuda":
            peak = f"{(torch.cuda.max_memory_allocated(device) - held) / GIB:.2f}"
        label = 1e3 / (rate * model.config.text_config.num_hidden_layers)
        yield f"{text:20d}  {rate:9.3f}  {args.samples / rate / 60:21.1f}  {label:14.2f}  {peak}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--answer", type=int, default=8, help="answer tokens, closing EOS included")
    parser.add_argument("--every", type=int, default=4, help="the thinning that is shown apart")
    parser.add_argument("--text", type=int, default=25, help="text after the image in the timed comparison")
    parser.add_argument("--throughput", action="store_true", help="of the teacher pass alone")
    parser.add_argument("--seven-b", action="store_true", help="--throughput at the whole 7B shape")
    parser.add_argument("--texts", type=int, nargs="+", default=TEXTS, help="for the throughput table")
    parser.add_argument("--samples", type=int, default=6650, help="size of the papers' training selection")
    parser.add_argument("--memory-budget", type=float, help="GiB beside the weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.throughput or args.seven_b:
        model = seven_b(args) if args.seven_b else build_model(args)
        print_setting(setting_of(args, tokens=f"{PREFIX} + {VISUAL} visual + text, batch {args.batch}"))
        for line in throughput(args, model):
            print(line, flush=True)
        return
    vision = vision_tower_flops(transformers.CLIPVisionConfig(**CLIP_L_336)) or 0.0
    print(f"LLaVA-1.5-7B, {PREFIX} + {VISUAL} visual + text, {args.answer} of it answer: FLOPs, exact")
    print("\n".join(table(SEVEN_B, vision, args.answer, args.every)), end="\n\n")
    print("labels per FLOP against the reference, where several questions are asked about an image")
    print("\n".join(shared_table(SEVEN_B, vision, args.answer)), end="\n\n")
    print(f"FLOPs of every {args.every}th exit behind every {args.every}th freeze, against all exits alone")
    print("\n".join(grid_table(SEVEN_B, args.answer, args.every)), end="\n\n")
    compare(args)


if __name__ == "__main__":
    main()

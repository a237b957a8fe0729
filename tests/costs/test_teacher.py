"""What a teacher pass computes: counted, not timed; and what it holds in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dyvte.backbones.sizes import DecoderShape, decoder_shape
from dyvte.costs.teacher import SampleShape, mean_reference_step_flops, reference_step_flops, teacher_flops
from dyvte.costs.vision import vision_tower_flops
from dyvte.errors import MemoryBudgetError
from dyvte.teacher import Trace, streams, trace_exits
from dyvte.teacher.memory import GIB, PassPlan, PassSizes, plan_pass
from dyvte.teacher.trace import COLUMNS

IMAGE = 3
LAYERS = 4


def llava(
    attention: str = "eager", *, hidden: int = 64, kv_heads: int = 2, vocab: int = 128, layers: int = LAYERS
):
    """A random LLaVA with 16 visual tokens an image."""
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    text = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": 3 * hidden, "vocab_size": vocab,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": kv_heads,
        "initializer_range": 0.1,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1
    )
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config)
    return model.eval().requires_grad_(False)


def batch(rows: int, prefix: int, text: int, answer: int, images: int = 1):
    """Equal rows without padding; the answer comes last."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 100, (rows, prefix + 16 * images + text), generator=generator)
    ids[:, prefix : prefix + 16 * images] = IMAGE
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, -answer:] = True
    pixels = torch.randn(rows * images, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}, mask


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("exits", [None, (0, 3), (2,)])
@pytest.mark.parametrize(("prefix", "text", "answer"), [(9, 12, 5), (40, 12, 1)])
def test_the_formula_is_what_runs(kv_heads: int, exits, prefix: int, text: int, answer: int) -> None:
    """Exact: so text before the image runs once, streams hold only what is read, and nothing else runs."""
    model = llava(kv_heads=kv_heads)
    inputs, mask = batch(2, prefix, text, answer)
    vision = counted(lambda: model.model.get_image_features(pixel_values=inputs["pixel_values"]))
    found = counted(lambda: trace_exits(model, inputs, mask, exits=exits)) - vision
    sample = SampleShape(prefix=prefix, visual=16, text=text, answer=answer)
    assert found == 2 * teacher_flops(decoder_shape(model.config), sample, exits)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("exits", "freezes"), [(None, ()), (None, (0, 2)), ((0, 3), (0, 1, 3)), ((2,), (3,))]
)
def test_the_formula_counts_grids_and_shared_images(kv_heads: int, share: bool, exits, freezes) -> None:
    """Exact: frozen tokens cost keys and values, the image and its frozen states are paid for once."""
    model = llava(kv_heads=kv_heads)
    inputs, mask = batch(4, 9, 12, 5)
    # Two images with two questions each, behind the same text.
    inputs["pixel_values"] = inputs["pixel_values"][[0, 1, 0, 1]]
    inputs["input_ids"][:, :9] = inputs["input_ids"][0, :9]
    one, two = inputs["pixel_values"][:2], inputs["pixel_values"]
    vision = counted(lambda: model.model.get_image_features(pixel_values=one if share else two))
    how = {"exits": exits, "freezes": freezes}
    found = counted(lambda: trace_exits(model, inputs, mask, share_images=share, **how)) - vision
    sample = SampleShape(prefix=9, visual=16, text=12, answer=5)
    together, alone = (teacher_flops(decoder_shape(model.config), sample, questions=q, **how) for q in (2, 1))
    assert found == (2 * together if share else 4 * alone)
    assert together < 2 * alone


def test_a_step_of_the_reference_is_two_passes_after_its_layer() -> None:
    model = llava()
    inputs, _ = batch(1, 9, 12, 5)
    vision = counted(lambda: model.model.get_image_features(pixel_values=inputs["pixel_values"]))
    shape, sample = decoder_shape(model.config), SampleShape(prefix=9, visual=16, text=12, answer=5)
    once = counted(lambda: model(**inputs)) - vision
    head = 2 * 64 * 128 * sample.total
    assert reference_step_flops(shape, sample, LAYERS) == once + head  # nothing left to double but the head
    layer = (once - head) // LAYERS
    assert reference_step_flops(shape, sample, 1) == once + head + (LAYERS - 1) * layer


@pytest.mark.parametrize(("text", "least"), [(25, 25.0), (75, 18.0)])
@pytest.mark.parametrize("answer", [1, 5, 10])
def test_labels_per_flop_at_the_shape_of_llava_7b(text: int, least: float, answer: int) -> None:
    shape = DecoderShape(
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        ffn_sizes_L=(11008,) * 32,
        vocab_size=32000,
    )
    sample = SampleShape(prefix=35, visual=576, text=text, answer=answer)
    assert 32 * mean_reference_step_flops(shape, sample) / teacher_flops(shape, sample) >= least


@pytest.mark.parametrize("answer", [1, 5, 10])
def test_labels_per_flop_where_ten_questions_share_an_image(answer: int) -> None:
    """At the shape of LLaVA-1.5-7B; the vision tower, once an image, counted on both sides."""
    shape = DecoderShape(
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        ffn_sizes_L=(11008,) * 32,
        vocab_size=32000,
    )
    tower = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14,
    }  # fmt: skip
    vision = vision_tower_flops(transformers.CLIPVisionConfig(**tower))
    sample = SampleShape(prefix=35, visual=576, text=25, answer=answer)
    labels = 10 * 32
    ours = (teacher_flops(shape, sample, questions=10) + vision) / labels
    assert (mean_reference_step_flops(shape, sample) + vision) / ours >= 62


# --- memory ---


def peak_bytes(function, scratch: Path) -> int:
    """Most bytes of the CPU allocator above those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    profiler.export_chrome_trace(str(scratch))
    events = [e for e in json.loads(scratch.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return max(totals) - (totals[0] - events[0]["args"]["Bytes"])


def made_plans(monkeypatch) -> list[tuple[PassSizes, PassPlan]]:
    """What each later pass is planned from, and the plan."""
    plans: list[tuple[PassSizes, PassPlan]] = []
    plan = streams.plan_pass

    def spy(sizes, **how):
        plans.append((sizes, plan(sizes, **how)))
        return plans[-1][1]

    monkeypatch.setattr(streams, "plan_pass", spy)
    return plans


@pytest.mark.parametrize(
    ("attention", "kv_heads", "vocab", "images", "text", "answer"),
    [
        ("sdpa", 4, 128, 12, 40, 4),
        ("sdpa", 2, 128, 1, 150, 20),
        ("sdpa", 4, 4000, 2, 50, 40),
        ("eager", 4, 128, 6, 60, 4),
    ],
    ids=["visual", "text", "answers and vocabulary", "attention scores"],
)
def test_the_peak_stays_within_the_estimate_and_the_estimate_is_no_guess(
    attention, kv_heads, vocab, images, text, answer, monkeypatch, tmp_path
) -> None:
    model = llava(attention, kv_heads=kv_heads, vocab=vocab)
    inputs, mask = batch(2, 20, text, answer, images)
    plans = made_plans(monkeypatch)
    roomy = trace_exits(model, inputs, mask, memory_budget=10**12)
    sizes, plan = plans[-1]
    assert (plan.exits_per_call, plan.positions_per_head) == (LAYERS, 2 * answer)
    least = sizes.least()
    with pytest.raises(MemoryBudgetError, match=r"2 rows of \d+ tokens takes about .* GiB"):
        trace_exits(model, inputs, mask, memory_budget=least - 1)
    for budget in (least, (least + plan.peak_bytes) // 2):
        traces: list[Trace] = []

        def traced(budget: int = budget, into: list[Trace] = traces) -> None:
            into.append(trace_exits(model, inputs, mask, memory_budget=budget))

        peak = peak_bytes(traced, tmp_path / "trace.json")
        estimate = plans[-1][1].peak_bytes
        assert 0.4 * estimate <= peak <= estimate <= budget
        for name in COLUMNS:
            torch.testing.assert_close(getattr(traces[0], name), getattr(roomy, name), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("attention", "freezes", "images", "text", "answer"),
    [("sdpa", (0, 1, 2, 3), 6, 40, 4), ("eager", (0, 2), 3, 80, 4), ("sdpa", (), 3, 80, 10)],
    ids=["all frozen", "attention scores", "no grid"],
)
def test_the_peak_of_grids_and_shared_images_stays_within_the_estimate(
    share, attention, freezes, images, text, answer, monkeypatch, tmp_path
) -> None:
    model = llava(attention)
    inputs, mask = batch(4, 20, text, answer, images)
    # Two sets of images, each asked about twice.
    inputs["pixel_values"] = inputs["pixel_values"][: 2 * images].repeat(2, 1, 1, 1)
    inputs["input_ids"][:, :20] = inputs["input_ids"][0, :20]
    plans = made_plans(monkeypatch)
    how = {"freezes": freezes, "share_images": share}
    roomy = trace_exits(model, inputs, mask, memory_budget=10**12, **how)
    sizes, plan = plans[-1]
    assert sizes.images == (2 if share else 0)
    for budget in (sizes.least(), (sizes.least() + plan.peak_bytes) // 2):
        traces: list[Trace] = []

        def traced(budget: int = budget, into: list[Trace] = traces) -> None:
            into.append(trace_exits(model, inputs, mask, memory_budget=budget, **how))

        peak = peak_bytes(traced, tmp_path / "trace.json")
        estimate = plans[-1][1].peak_bytes
        assert 0.4 * estimate <= peak <= estimate <= budget
        for name in COLUMNS:
            torch.testing.assert_close(
                traces[0].labels(name), roomy.labels(name), atol=1e-5, rtol=1e-4, equal_nan=True
            )


def test_a_budget_decides_how_much_runs_at_once(monkeypatch) -> None:
    """Where text behind the image is long, exits take the memory; where the vocabulary is, positions do."""
    sizes = PassSizes(
        rows=2, tokens=900, prefix=35, suffix=300, predicted=200, schedules=33, num_layers=32, hidden=4096,
        query_width=4096, key_width=4096, heads=32, ffn=11008, vocab=32000, features=8192, element_size=2,
        eager=False,
    )  # fmt: skip
    tight, roomy = (plan_pass(sizes, budget=sizes.least() + more) for more in (0, 8 * GIB))
    assert 1 <= tight.exits_per_call < roomy.exits_per_call <= 32
    assert tight.positions_per_head < roomy.positions_per_head == 200
    assert tight.peak_bytes <= sizes.least() < roomy.peak_bytes <= sizes.least() + 8 * GIB
    unlimited = plan_pass(sizes)
    assert unlimited.exits_per_call == 3  # no call of more tokens than the full model's
    assert plan_pass(sizes, may_cut_head=False).positions_per_head == 200
    assert plan_pass(replace(sizes, schedules=9), budget=sizes.least()).peak_bytes < tight.peak_bytes
    with pytest.raises(MemoryBudgetError, match="raise the budget"):
        plan_pass(sizes, budget=sizes.least() - 1)

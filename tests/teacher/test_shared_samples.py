"""From samples to traces where images are shared and freeze layers are labelled."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dyvte.backbones import load_backbone
from dyvte.cli import main
from dyvte.data import Sample, Selection, open_conversations, select, selection_sha256
from dyvte.data.scenes.writers import write_instruct
from dyvte.errors import CheckpointError, ConfigError
from dyvte.teacher import Teacher, TeacherConfig, TraceStore, write_traces
from tests.helpers.models import random_image, tiny_llava
from tests.helpers.passes import check_grid, close

ROOT = Path(__file__).parents[2]
LAYERS = 4
QUESTIONS = ["how many ?", "what color is the circle ?", "is there any red square on the left ?"]


@pytest.fixture(scope="module")
def backbone():
    model, processor = tiny_llava(layers=LAYERS)
    # A random model never says EOS; words that it does say close its answers here.
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, 34, 31]
    return model, processor


@pytest.fixture
def selection(tmp_path: Path) -> Selection:
    """Three questions about each of four images, whose ids say nothing of it: all name the same image."""
    samples = []
    for index in range(12):
        path = tmp_path / f"{index}.png"
        random_image(index % 4).save(path)
        samples.append(
            Sample(
                id=f"s{index}", image=path, question=QUESTIONS[index // 4], answer="red", image_id="one.png"
            )
        )  # fmt: skip
    return Selection(samples=tuple(samples), counts={}, sha256=selection_sha256(samples))


def teacher_of(backbone, **settings) -> Teacher:
    settings = {"batch_size": 6, "shard_batches": 2, "max_new_tokens": 3, **settings}
    return Teacher(*backbone, TeacherConfig(**settings))


@pytest.mark.parametrize("labels", [{}, {"try_answers": True}, {"label_source": "data"}])
def test_shared_and_separate_images_give_the_same_store(backbone, selection, labels, tmp_path: Path) -> None:
    shared = write_traces(tmp_path / "shared", teacher_of(backbone, freeze_every=2, **labels), selection)
    apart = write_traces(
        tmp_path / "apart",
        teacher_of(backbone, freeze_layers=(2, 0), share_images=False, **labels),
        selection,
    )
    assert shared.manifest == apart.manifest
    close(shared.trace(), apart.trace())
    assert shared.trace().freezes == (0, 2)
    for shard in shared.shards():
        shard.trace.grid.check(shard.trace.exits, shard.trace.tensors())
    notes, separate = shared.notes(), apart.notes()
    assert {name: notes[name] for name in notes if name != "visual_streams"} == {
        name: separate[name] for name in separate if name != "visual_streams"
    }
    # Every question once, those that were tried in vain once more; two batches of three questions an image.
    passes = 2 if labels.get("try_answers") else 1
    assert separate["visual_streams"] >= 12
    assert notes["visual_streams"] <= 4 * passes


def test_answers_are_generated_with_one_prefill_of_each_image(backbone, selection) -> None:
    model, _ = backbone
    mlp, found, seen = model.get_decoder().layers[0].mlp, [], []
    forward = mlp.forward

    def noting(states):
        seen.append(states.shape[:2].numel())
        return forward(states)

    for shares in (True, False):
        teacher = teacher_of(backbone, share_images=shares)
        prompts = teacher.prepare(selection.samples).inputs
        visual_ids = torch.tensor(teacher.backbone.visual_token_ids)
        num_visual = int(torch.isin(prompts["input_ids"], visual_ids).sum())
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mlp, "forward", noting)
            found.append((*teacher.answer(prompts), sum(seen)))
    (shared, shared_BN, some), (apart, apart_BN, all_of_them) = found
    assert torch.equal(shared["input_ids"], apart["input_ids"])
    assert torch.equal(shared_BN, apart_BN)
    # four images in place of twelve, and no padding more
    assert some <= all_of_them - num_visual * 8 // 12


def test_what_the_image_holds_decides_not_its_path_or_id(backbone, selection, tmp_path: Path) -> None:
    teacher = teacher_of(backbone, label_source="data", batch_size=12)
    before, _ = teacher.trace(selection.samples)
    assert before.notes == {"visual_streams": 4}
    assert set(before.image_ids) == {"one.png"}
    # A changed picture under a path that others once shared.
    changed = selection.samples[4]
    random_image(99).save(changed.image)
    after, _ = teacher.trace(selection.samples)
    assert after.notes == {"visual_streams": 5}
    others = [row for row in range(12) if row != 4]
    close(after.trace.rows(others), before.trace.rows(others))
    alone, _ = teacher.trace([changed])
    close(after.trace.rows([4]), alone.trace)
    assert (after.trace.risk[4] - before.trace.risk[4]).abs().max() > 1e-3
    # The same picture under two paths.
    same = replace(changed, id="same", image=tmp_path / "copy.png")
    random_image(99).save(same.image)
    both, _ = teacher.trace([changed, same])
    assert both.notes == {"visual_streams": 1}
    assert torch.equal(both.trace.risk[0], both.trace.risk[1])


def test_turns_of_a_conversation_share_their_image(backbone, tmp_path: Path) -> None:
    random_image(0).save(tmp_path / "0.png")
    asked = [("how many ?", "two"), ("what color ?", "red or blue"), ("is there any square ?", "yes")]
    samples = [
        Sample(
            id=str(turn), image=tmp_path / "0.png", question=question, answer=answer, image_id="0",
            history=tuple(asked[:turn]),
        )
        for turn, (question, answer) in enumerate(asked)
    ]  # fmt: skip
    shared, _ = teacher_of(backbone, label_source="data", freeze_every=3).trace(samples)
    apart, _ = teacher_of(backbone, label_source="data", freeze_every=3, share_images=False).trace(samples)
    assert (shared.notes, apart.notes) == ({"visual_streams": 1}, {"visual_streams": 3})
    close(shared.trace, apart.trace)


def test_a_grid_is_stored_resumed_and_thinned(backbone, selection, tmp_path: Path) -> None:
    teacher = teacher_of(backbone, freeze_every=2, exit_every=2, batch_size=2)
    store = write_traces(tmp_path / "a", teacher, selection)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    (tmp_path / "a" / "shard-00001.safetensors").unlink()
    write_traces(tmp_path / "a", teacher_of(backbone, freeze_every=2, exit_every=2, batch_size=2), selection)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == whole
    assert TraceStore.open(tmp_path / "a").manifest.freezes == store.trace().freezes == (0, 2)
    assert store.trace().exits == (0, 2, 4)
    every = teacher_of(backbone, freeze_layers=tuple(range(LAYERS)), batch_size=2)
    other = write_traces(tmp_path / "b", every, selection).trace()
    close(store.trace(), other.thinned(exits=(0, 2, 4), freezes=(0, 2)))
    with pytest.raises(CheckpointError, match="freezes: stored '0,2', this run '0,1,2,3'"):
        write_traces(
            tmp_path / "a", teacher_of(backbone, freeze_every=1, exit_every=2, batch_size=2), selection
        )


def test_a_batch_too_large_for_the_budget_is_halved_with_its_grid(backbone, selection) -> None:
    settings = {"freeze_every": 1, "label_source": "data", "batch_size": 12}
    whole, _ = teacher_of(backbone, **settings).trace(selection.samples)
    small = teacher_of(backbone, **settings, memory_budget=0.0006)
    halves, _ = small.trace(selection.samples)
    assert halves.notes["visual_streams"] > whole.notes["visual_streams"]
    close(halves.trace, whole.trace)


def test_settings_that_make_no_sense_are_refused(backbone) -> None:
    with pytest.raises(ConfigError, match="not by both"):
        TeacherConfig(freeze_every=2, freeze_layers=(1,))
    with pytest.raises(ValueError, match="freeze_every must be at least 1"):
        TeacherConfig(freeze_every=0)
    with pytest.raises(ConfigError, match=r"expected layers in 0\.\.3"):
        teacher_of(backbone, freeze_layers=(1, LAYERS))


def test_a_family_that_cannot_share_is_named_once(backbone, selection, caplog, monkeypatch) -> None:
    from dyvte.teacher import images

    monkeypatch.setattr(images, "sees", lambda *_: True)
    teacher = teacher_of(backbone, label_source="data")
    with caplog.at_level(logging.WARNING):
        for start in (0, 6):
            shard, _ = teacher.trace(selection.samples[start : start + 6])
            assert shard.notes == {"visual_streams": 6}
    (record,) = caplog.records
    assert "llava: its image tokens see the text behind them" in record.getMessage()


def test_layers_that_cannot_stop_early_give_the_same_grid(backbone, selection) -> None:
    model, _ = backbone
    teacher = teacher_of(backbone, label_source="data", freeze_every=1)
    expected, _ = teacher.trace(selection.samples[:6])
    # As offloading and gathering do it.
    handles = [
        layer.mlp.register_forward_hook(lambda *_: None) for layer in model.model.language_model.layers
    ]
    try:
        found, _ = teacher.trace(selection.samples[:6])
    finally:
        for handle in handles:
            handle.remove()
    close(found.trace, expected.trace)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_on_keys_and_values_counts_in_frozen_layers(selection) -> None:
    peft = pytest.importorskip("peft")
    model, processor = tiny_llava(layers=LAYERS)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q|k|v)_proj", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config).eval()
    settings = {"label_source": "data", "freeze_every": 1}
    found, _ = teacher_of((adapted, processor), **settings).trace(selection.samples[:6])
    merged = adapted.merge_and_unload()
    expected, _ = teacher_of((merged, processor), **settings, share_images=False).trace(selection.samples[:6])
    close(found.trace, expected.trace)


def test_the_command_prints_the_grid(backbone, selection, tmp_path: Path, capsys) -> None:
    model, processor = backbone
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    lines = [
        {"id": one.id, "image": one.image.name, "conversations": [
            {"from": "human", "value": f"<image>\n{one.question}"}, {"from": "gpt", "value": one.answer},
        ]} for one in selection.samples
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(lines))
    asked = ["--model", str(tmp_path / "model"), "--data_path", str(tmp_path / "data.json")]
    asked += ["--image_folder", str(tmp_path), "--label_source", "data", "--output", str(tmp_path / "out")]
    assert main(["trace", *asked, "--freeze_every", "2", "--exit_every", "2"]) == 0
    printed = capsys.readouterr().out
    trace = TraceStore.open(tmp_path / "out").trace()
    assert trace.freezes == (0, 2)
    rows = [line.split() for line in printed.splitlines()]
    assert ["f", "\\", "k", "0", "2", "4"] in rows
    risk = trace.labels("risk").double().mean(0)
    for name, row, exits in (("0", 0, (0, 2, 4)), ("2", 1, (2, 4)), ("none", 2, (0, 2, 4))):
        assert [name, *(f"{float(risk[row, k]):.4f}" for k in exits)] in rows
    assert ["visual", "streams:", "4"] in rows


def test_the_embedded_backbone_equals_separate_passes(tmp_path: Path) -> None:
    model, processor = load_backbone(ROOT / "checkpoints" / "tiny-llava")
    path = write_instruct(tmp_path, "test", 16)
    samples = select(open_conversations(path, tmp_path / "instruct" / "images")).samples
    teacher = Teacher(model, processor, TeacherConfig(label_source="data", freeze_layers=(0, 3)))
    shard, _ = teacher.trace(samples)
    assert shard.notes == {"visual_streams": len({one.image_id for one in samples})} == {"visual_streams": 2}
    ready = teacher.prepare(samples)
    visual_ids = teacher.backbone.visual_token_ids
    check_grid(shard.trace, model, ready.inputs, ready.answer_BN, visual_ids, teacher.config.features)
    apart, _ = Teacher(model, processor, replace(teacher.config, share_images=False)).trace(samples)
    close(shard.trace, apart.trace)

"""Greedy labels, traces on disk, and the teacher's agreement with the inference runtime."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dyvte.backbones import encode, get_template
from dyvte.data import Sample, Selection, selection_sha256
from dyvte.errors import CheckpointError, DataError
from dyvte.gates import GateConfig, GateStack
from dyvte.runtime import VisualExit
from dyvte.teacher import Teacher, TeacherConfig, TraceStore, greedy_answers, trace_exits, write_traces
from tests.helpers.models import random_image, tiny_llava

LAYERS = 4
QUESTIONS = ["how many ?", "what color is the circle ?", "is there any red square on the left ?"]


@pytest.fixture(scope="module")
def backbone():
    model, processor = tiny_llava(layers=LAYERS)
    # A random model never says EOS; words that it does say close its answers here.
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, 34, 31]
    return model, processor


def prompts_of(processor, count: int):
    template = get_template("auto", processor)
    rendered = [template.render(QUESTIONS[row % 3]) for row in range(count)]
    images = [[random_image(row)] for row in range(count)]
    return encode(processor, rendered, images, padding_side="left")[0]


def generate(model, inputs, tokens: int) -> torch.Tensor:
    new = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return torch.nn.functional.pad(
        new, (0, tokens - new.shape[1]), value=model.generation_config.pad_token_id
    )


def test_labels_are_the_generated_tokens_up_to_their_eos(backbone) -> None:
    model, processor = backbone
    inputs = prompts_of(processor, 24)
    width = inputs["input_ids"].shape[1]
    grown, mask = greedy_answers(model, inputs, max_new_tokens=5)
    plain = generate(model, inputs, 5)
    eos = torch.tensor(model.generation_config.eos_token_id)
    lengths = []
    for row in range(24):
        ends = torch.isin(plain[row], eos).nonzero().flatten()
        lengths.append(int(ends[0]) + 1 if len(ends) else 5)
        answer = grown["input_ids"][row][mask[row]]
        assert answer.tolist() == plain[row, : lengths[-1]].tolist()
    assert len(set(lengths)) > 2, "answers of one length would test little"
    assert not mask[:, :width].any()
    assert torch.equal(grown["attention_mask"][:, :width], inputs["attention_mask"])
    assert torch.equal(grown["attention_mask"][:, width:].bool(), mask[:, width:])


def test_same_answer_is_what_generation_with_that_exit_gives(backbone) -> None:
    model, processor = backbone
    inputs = prompts_of(processor, 24)
    trace = trace_exits(model, *greedy_answers(model, inputs, max_new_tokens=5))
    full = generate(model, inputs, 5)
    for k in range(1, LAYERS + 1):
        with VisualExit.fixed(k)(model):
            exited = generate(model, inputs, 5)
        assert torch.equal(trace.same_answer[:, k].bool(), (exited == full).all(1))
    assert 0 < trace.same_answer[:, 2].mean() < 1


def test_gates_see_in_training_what_they_see_at_inference(backbone) -> None:
    model, processor = backbone
    inputs = prompts_of(processor, 5)
    gates = GateStack.init(GateConfig(num_layers=LAYERS, hidden_size=32), seed=1)
    with torch.no_grad():
        trained_on = gates(trace_exits(model, *greedy_answers(model, inputs, max_new_tokens=3)).features)
    with VisualExit(gates, threshold=1.0)(model) as run:
        model.generate(**inputs, max_new_tokens=1)
    seen = run.gate_logits[:, : LAYERS - 1]
    assert seen.isfinite().all()
    torch.testing.assert_close(trained_on[:, : LAYERS - 1], seen, atol=1e-5, rtol=1e-5)


# --- stores ---


@pytest.fixture
def selection(tmp_path: Path) -> Selection:
    samples = []
    for index in range(11):
        random_image(index).save(tmp_path / f"{index}.png")
        samples.append(
            Sample(
                id=f"s{index}", image=tmp_path / f"{index}.png", question=QUESTIONS[index % 3],
                answer="red", image_id=f"{index // 2}.png",
            )
        )  # fmt: skip
    return Selection(samples=tuple(samples), counts={}, sha256=selection_sha256(samples))


def teacher_of(backbone, **settings) -> Teacher:
    settings = {"batch_size": 2, "shard_batches": 2, "max_new_tokens": 3, **settings}
    return Teacher(*backbone, TeacherConfig(**settings))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_store_holds_the_selection_in_order(backbone, selection: Selection, tmp_path: Path) -> None:
    done = []
    store = write_traces(tmp_path / "t", teacher_of(backbone), selection, progress=done.append)
    trace = store.trace()
    assert store.complete
    assert sum(done) == 11
    assert trace.sample_ids == tuple(sample.id for sample in selection.samples)
    assert store.image_ids() == tuple(sample.image_id for sample in selection.samples)
    assert store.notes()["answers_not_reproduced"] == 0
    assert 0 < store.notes()["answers_cut"] < 11
    alone, defects = teacher_of(backbone).trace(selection.samples[4:5])
    assert not defects
    torch.testing.assert_close(trace.rows([4]).risk, alone.trace.risk, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(trace.rows([4]).features, alone.trace.features, atol=1e-5, rtol=1e-4)


def test_trying_the_given_answers_first_gives_the_same_traces(selection: Selection, tmp_path: Path) -> None:
    """Answers that are the model's own need no generation; all others, near misses included, do."""
    model, processor = tiny_llava(layers=LAYERS)
    settings = {"max_new_tokens": 6}
    teacher = teacher_of((model, processor), **settings)
    prompts = teacher.prepare(selection.samples).inputs
    # A random model never says EOS: let it be the word that it says most often after its first one, and
    # another one end answers as well.
    eos = processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id = None
    often = torch.bincount(generate(model, prompts, 6)[:, 1:].flatten()).argsort(descending=True)
    with torch.no_grad():
        model.lm_head.weight[[eos, int(often[0])]] = model.lm_head.weight[[int(often[0]), eos]]
    model.generation_config.eos_token_id = [eos, int(often[1])]
    plain = write_traces(tmp_path / "plain", teacher, selection)
    grown, mask = greedy_answers(model, prompts, max_new_tokens=6)
    words = [processor.tokenizer.decode(grown["input_ids"][row][mask[row]][:-1]) for row in range(11)]
    samples = tuple(
        replace(sample, answer=answer or "red")
        for sample, answer in zip(selection.samples, words, strict=True)
    )
    trying = teacher_of((model, processor), try_answers=True, **settings)
    tried = write_traces(tmp_path / "tried", trying, replace(selection, samples=samples))
    ends = [int(grown["input_ids"][row][mask[row]][-1]) for row in range(11)]
    own = [bool(answer) and end == eos for answer, end in zip(words, ends, strict=True)]
    assert 0 < sum(own) < 11
    assert tried.notes()["answers_generated"] == 11 - sum(own)
    for name in ("risk", "same_answer", "loss", "features"):
        torch.testing.assert_close(
            getattr(tried.trace(), name), getattr(plain.trace(), name), atol=1e-5, rtol=1e-4
        )
    assert tried.trace().sample_ids == plain.trace().sample_ids


def test_resume_after_a_kill_and_two_ranks_write_the_same_bytes(
    backbone, selection: Selection, tmp_path: Path
) -> None:
    teacher = teacher_of(backbone)
    write_traces(tmp_path / "one", teacher, selection)
    whole = content(tmp_path / "one")
    assert len(whole) == 4

    for rank in (1, 0):
        write_traces(tmp_path / "two", teacher, selection, rank=rank, world_size=2)
    assert content(tmp_path / "two") == whole

    (tmp_path / "one" / "shard-00001.safetensors").unlink()
    truncated = tmp_path / "one" / "shard-00002.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="2 of 3 trace shards are missing"):
        TraceStore.open(tmp_path / "one").trace()
    untouched = (tmp_path / "one" / "shard-00000.safetensors").stat().st_mtime_ns
    write_traces(tmp_path / "one", teacher, selection)
    assert content(tmp_path / "one") == whole
    assert (tmp_path / "one" / "shard-00000.safetensors").stat().st_mtime_ns == untouched


@pytest.mark.parametrize("field", ["backbone", "backbone_weights", "data", "prompt", "labels"])
def test_foreign_traces_are_refused_naming_the_field(
    backbone, selection: Selection, tmp_path: Path, field: str
) -> None:
    small = replace(selection, samples=selection.samples[:2])
    write_traces(tmp_path, teacher_of(backbone), small)
    other = {
        "backbone": lambda: (teacher_of(tiny_llava(layers=3)), small),
        "backbone_weights": lambda: (teacher_of(tiny_llava(layers=LAYERS, seed=9)), small),
        "data": lambda: (teacher_of(backbone), replace(small, sha256="other")),
        "prompt": lambda: (teacher_of(backbone, template="v1"), small),
        "labels": lambda: (teacher_of(backbone, label_source="data"), small),
    }[field]
    teacher, samples = other()
    with pytest.raises(CheckpointError, match=rf"{field}: stored .*Remove that folder"):
        write_traces(tmp_path, teacher, samples)


def test_broken_images_and_too_long_samples_are_named_counted_and_limited(
    backbone, selection: Selection, tmp_path: Path
) -> None:
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"data\.json: sample 's3': image"):
        write_traces(tmp_path / "a", teacher_of(backbone), selection, file="data.json")
    store = write_traces(tmp_path / "b", teacher_of(backbone), selection, max_bad_samples=1)
    assert "s3" not in store.trace().sample_ids
    assert len(store.trace()) == 10
    assert len(store.dropped()) == 1

    # Prompts of QUESTIONS[2] are the longest; the answer is never cut to fit.
    short = teacher_of(backbone, max_length=16 + 9 + 3, label_source="greedy")
    with pytest.raises(DataError, match=r"s2.*answer would be cut"):
        write_traces(tmp_path / "c", short, replace(selection, samples=selection.samples[:3]))
    kept = write_traces(
        tmp_path / "d", short, replace(selection, samples=selection.samples[:3]), max_bad_samples=1
    )
    assert kept.trace().sample_ids == ("s0", "s1")


def test_unreadable_or_unwritable_stores(tmp_path: Path, backbone, selection: Selection) -> None:
    with pytest.raises(CheckpointError, match="no manifest"):
        TraceStore.open(tmp_path / "nowhere")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "manifest.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(CheckpointError, match="manifest"):
        TraceStore.open(tmp_path / "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_traces(tmp_path / "file" / "x", teacher_of(backbone), selection)

"""Whatever one sample makes a decoder, processor, tokenizer or template raise is a defect of that sample, by
the same rules wherever samples are read."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dyvte.calibration import measure_profile, search_exit_layer
from dyvte.data import Defect, Sample, Selection, select, selection_sha256
from dyvte.data.llava import Conversations
from dyvte.errors import ConfigError, DataError
from dyvte.teacher import Teacher, TeacherConfig, TraceStore, prepared_batches, write_traces
from tests.helpers.models import random_image, tiny_llava

PICKY = (
    "{% for m in messages %}{% for c in m['content'] if c['type'] == 'text' and 'triangle' in c['text'] %}"
    "{{ raise_exception('no triangles here') }}{% endfor %}{% endfor %}"
)


class Narrow:
    """The image processor of some families: it takes no picture of extreme shape."""

    def __init__(self, inner) -> None:
        self.inner = inner

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def __call__(self, images=None, **options):
        for image in images:
            if max(image.size) > 8 * min(image.size):
                raise AssertionError(f"ratio {image.size}")
        return self.inner(images=images, **options)


@pytest.fixture(scope="module")
def backbone():
    model, processor = tiny_llava(3, 32)
    processor.image_processor = Narrow(processor.image_processor)
    processor.chat_template = PICKY + processor.chat_template
    return model, processor


@pytest.fixture
def selection(tmp_path: Path) -> Selection:
    """Five good samples and five bad ones, a bad one in every batch of two, two of them together."""
    samples = []
    for number in range(5):
        random_image(number).save(tmp_path / f"{number}.png")
        picture = tmp_path / f"{number}.png"
        samples.append(sample(f"good{number}", picture, "what color is the circle ?"))
    good = tmp_path / "0.png"
    Image.new("RGB", (40, 1)).save(tmp_path / "strip.png")
    torn = (tmp_path / "1.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(torn[: len(torn) // 2])
    bad = [
        sample("strip", tmp_path / "strip.png", "how many ?"),
        sample("half", good, "what color \ud83d ?"),
        sample("jinja", good, "is it a triangle ?"),
        sample("torn", tmp_path / "torn.png", "how many ?"),
        sample("pad", good, "how <pad> many ?"),
    ]
    order = [samples[0], bad[0], bad[1], bad[2], samples[1], bad[3], *samples[2:4], bad[4], samples[4]]
    return Selection(samples=tuple(order), counts={}, sha256=selection_sha256(order))


BAD = {
    "strip": "image: AssertionError: ratio (40, 1)",
    "half": "conversations: TypeError",
    "jinja": "conversations: TemplateError: no triangles here",
    "torn": "image: ",
    "pad": "conversations: the question contains the special token '<pad>'",
}


def sample(sample_id: str, image: Path, question: str) -> Sample:
    return Sample(id=sample_id, image=image, question=question, answer="red", image_id=str(image))


def teacher_of(backbone, **settings) -> Teacher:
    return Teacher(*backbone, TeacherConfig(**{"batch_size": 2, "max_new_tokens": 3, **settings}))


@pytest.mark.parametrize("labels", ["greedy", "data"])
@pytest.mark.parametrize("size", [1, 2, 10])
def test_a_trace_names_them_and_goes_on_without(backbone, selection, labels, size, tmp_path: Path) -> None:
    settings = {"label_source": labels, "try_answers": labels == "greedy", "batch_size": size}
    teacher = teacher_of(backbone, **settings)
    store = write_traces(tmp_path / "all", teacher, selection, file="d.json", max_bad_samples=5)
    dropped = {text.split("'")[1]: text for text in store.dropped()}
    assert set(dropped) == set(BAD)
    for sample_id, problem in BAD.items():
        assert dropped[sample_id].startswith(f"d.json: sample {sample_id!r}: {problem}")
    good = replace(selection, samples=tuple(s for s in selection.samples if s.id not in BAD))
    alone = write_traces(tmp_path / "good", teacher, good)
    assert store.trace().sample_ids == alone.trace().sample_ids == tuple(f"good{i}" for i in range(5))
    torch.testing.assert_close(store.trace().risk, alone.trace().risk, atol=1e-5, rtol=1e-4)


def test_every_reader_counts_by_the_same_limit(backbone, selection, tmp_path: Path, caplog) -> None:
    teacher = teacher_of(backbone)

    def search(most: int):
        batches = prepared_batches(teacher, selection, file="d.json", max_bad_samples=most)
        return search_exit_layer(teacher.model, (ready.inputs for ready in batches))

    def profile(most: int):
        batches = prepared_batches(teacher, selection, file="d.json", max_bad_samples=most)
        return measure_profile(teacher.model, (ready.inputs for ready in batches))

    def trace(most: int):
        return write_traces(tmp_path / str(most), teacher, selection, file="d.json", max_bad_samples=most)

    for run in (search, profile, trace):
        with pytest.raises(DataError, match=r"5 unusable samples, 4 allowed(.|\n)*d\.json: sample 'strip'"):
            run(4)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert search(5).num_samples == 5
    named = [record.getMessage().split("'")[1] for record in caplog.records]
    assert sorted(named) == sorted(BAD)  # samples of one image come together
    assert profile(5).about["num_samples"] == 5
    good = replace(selection, samples=tuple(s for s in selection.samples if s.id not in BAD))
    expected = search_exit_layer(teacher.model, (r.inputs for r in prepared_batches(teacher, good)))
    torch.testing.assert_close(search(5).kl, expected.kl, atol=1e-6, rtol=1e-4)


def test_what_the_selection_excluded_is_named_too(backbone, selection, tmp_path: Path, caplog) -> None:
    unread = Defect(file="d.json", sample_id="no-image", field="image", problem="no image is given")
    good = replace(selection, samples=selection.samples[:1], defects=(unread,))
    with caplog.at_level(logging.WARNING):
        for rank in range(2):
            write_traces(tmp_path, teacher_of(backbone), good, rank=rank, world_size=2, max_bad_samples=1)
    assert [record.getMessage() for record in caplog.records] == [f"excluded: {unread}"]


def test_the_limit_on_length_holds_for_the_search(backbone, selection) -> None:
    good = [s for s in selection.samples if s.id not in BAD]
    long = sample("long", good[0].image, "how many ? " * 60)
    mixed = replace(selection, samples=(*good[:2], long, *good[2:]))
    teacher = teacher_of(backbone, max_length=150)
    with pytest.raises(DataError, match="1 unusable samples, 0 allowed"):
        list(prepared_batches(teacher, mixed))
    ready = list(prepared_batches(teacher, mixed, max_bad_samples=1))
    assert [s.id for batch in ready for s in batch.samples] == [s.id for s in good]


def test_defects_of_an_earlier_run_count_when_it_is_taken_up(backbone, selection, tmp_path: Path) -> None:
    teacher = teacher_of(backbone, shard_batches=1)
    write_traces(tmp_path, teacher, selection, max_bad_samples=5)
    (tmp_path / "shard-00004.safetensors").unlink()
    with pytest.raises(DataError, match="unusable samples, 3 allowed"):
        write_traces(tmp_path, teacher, selection, max_bad_samples=3)
    assert len(TraceStore.open(tmp_path).dropped() if TraceStore.open(tmp_path).complete else "") == 0


def test_settings_and_the_machine_are_no_samples_fault(backbone, selection, monkeypatch) -> None:
    teacher = teacher_of(backbone)
    for error in (MemoryError(), ConfigError("no such setting"), OSError(24, "too many open files")):

        def fail(*_args, error=error, **_options):
            raise error

        monkeypatch.setattr("dyvte.teacher.encoder.load_image", fail)
        with pytest.raises(type(error)):
            teacher.prepare(selection.samples[:1])


def test_what_fails_together_but_not_alone_is_no_samples_fault(backbone, selection, monkeypatch) -> None:
    teacher = teacher_of(backbone)
    alone = teacher.encoder.encode

    def picky(samples, images, **options):
        if len(samples) > 1:
            raise RuntimeError("two at a time")
        return alone(samples, images, **options)

    monkeypatch.setattr(teacher.encoder, "encode", picky)
    good = [s for s in selection.samples if s.id not in BAD]
    with pytest.raises(RuntimeError, match="two at a time"):
        teacher.prepare(good[:2])


def test_answers_longer_than_any_label_are_not_passed_over(backbone, selection) -> None:
    good = [s for s in selection.samples if s.id not in BAD]
    talkative = [replace(good[0], answer="red " * 50), *good[1:3]]
    teacher = teacher_of(backbone, try_answers=True, max_length=120)
    tried, defects = teacher.trace(talkative)
    assert not defects
    plain, _ = teacher_of(backbone, max_length=120).trace(talkative)
    torch.testing.assert_close(tried.trace.risk, plain.trace.risk, atol=1e-5, rtol=1e-4)


def test_a_reader_that_raises_over_a_record_names_it() -> None:
    class Odd(dict):
        def get(self, key, default=None):
            if key == "messages":
                raise OverflowError("odd")
            return super().get(key, default)

    rows = [Odd(id="odd"), json.loads('{"id": "fine", "conversations": [{"from": "human", "value": "a"}]}')]
    data = Conversations(name="rows", records=lambda _: iter(rows), image_folder=Path())
    chosen = select(data, image_only=False, max_bad_samples=1)
    assert [s.id for s in chosen.samples] == ["fine"]
    assert str(chosen.defects[0]) == "rows: sample 'odd': entry: OverflowError: odd"

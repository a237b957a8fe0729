"""What studies look at in tests: a tiny model with questions, and one question's inputs on their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

from dyvte.analysis import AnalysisConfig, Subject
from dyvte.backbones import BackboneConfig, get_template
from dyvte.data import load_image
from dyvte.evaluation.generation import Pipeline
from dyvte.tasks.base import get_benchmark
from tests.helpers.fixtures import write_mini_gqa
from tests.helpers.models import tiny_llava

LAYERS, NEW = 4, 4
SIDE = 4
VISUAL = SIDE * SIDE
"""Visual tokens of an image, and how many lie side by side."""


def studied_world(root: Path) -> SimpleNamespace:
    """A model, its eager twin, a benchmark."""
    write_mini_gqa(root / "gqa", questions=9, images=3)
    model, processor = tiny_llava(LAYERS)
    eager, _ = tiny_llava(LAYERS, attn_implementation="eager")
    benchmark = get_benchmark("gqa")
    return SimpleNamespace(
        root=root,
        eager=eager,
        pipeline=Pipeline(model, processor, get_template("chat", processor), max_new_tokens=NEW),
        benchmark=benchmark,
        questions=benchmark.load(root / "gqa"),
    )


def subject_of(world: SimpleNamespace, output: Path, **changes) -> Subject:
    """The world as a study takes it."""
    settings = AnalysisConfig(
        model=BackboneConfig(path="tiny"),
        benchmark="gqa",
        data=world.root / "gqa",
        output=output,
        question_suffix="",
        batch_size=4,
        max_new_tokens=NEW,
        timing_batches=0,
        samples=4,
    )
    return Subject(dataclasses.replace(settings, **changes), world.pipeline, world.benchmark, world.questions)


def alone(world: SimpleNamespace, question, image: bool = True) -> dict:
    """Inputs of one question, from the processor itself."""
    pipeline = world.pipeline
    prompt = pipeline.template.render(question.text, has_image=1 if image else 0).text
    images = {"images": load_image(question.image)} if image else {}
    return dict(pipeline.processor(text=prompt, **images, return_tensors="pt", add_special_tokens=False))


def greedy(model, inputs: dict, **options):
    """What the model generates for these inputs, prompt included."""
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)

"""Put questions to a model in batches: prompts, images, greedy generation with exits, answers.

Shape letters: B rows, N tokens, L decoder layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dyvte.backbones import BackboneConfig, PromptTemplate, RenderedPrompt, encode, generate_greedily
from dyvte.backbones.encode import takes_videos
from dyvte.backbones.greedy import in_answer
from dyvte.backbones.segmenter import Segmenter, token_states
from dyvte.backbones.sizes import decoder_shape
from dyvte.data.defects import is_of_sample
from dyvte.errors import ConfigError
from dyvte.evaluation.checks import defects_alone, open_image, refuse
from dyvte.evaluation.masks import with_masks
from dyvte.evaluation.run_log import Answer, pack_layers
from dyvte.formatting import GIB
from dyvte.groups import open_group
from dyvte.readers.videos import SAMPLINGS, read_frames
from dyvte.registry import unknown
from dyvte.runtime import ImageStore, VisualExit
from dyvte.runtime.records import PrefillRecord
from dyvte.tasks.base import Question


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """A backbone and how it answers, whoever brings the questions."""

    model: BackboneConfig = field(metadata=open_group("path"))
    """The backbone: folder or hub id, or the group of its settings, which may also stand beside it."""
    template: str = "auto"
    """Prompt template: v1, chat or auto."""
    batch_size: int = 16
    """Questions per batch."""
    max_new_tokens: int = 16
    """Longest answer, in tokens."""
    num_frames: int = 8
    """Frames sampled from a video."""
    frame_sampling: str = "linspace"
    """How: "linspace", from the first to the last as Video-LLaVA and lmms-eval do, or "transformers", the
    first of each of equal parts."""
    seed: int = 0
    """Of everything that is drawn at random."""
    max_bad_samples: int = 0
    """Questions that cannot be asked (image, text) and are tolerated: they are named and counted."""
    image_store: float = 2.0
    """GiB for images that several questions show, each computed once; 0: every question computes its own."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "num_frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.frame_sampling not in SAMPLINGS:
            raise ConfigError(unknown("frame_sampling", self.frame_sampling, SAMPLINGS))
        if self.max_bad_samples < 0:
            raise ConfigError(f"max_bad_samples must be at least 0, found {self.max_bad_samples}")
        if not 0 <= self.image_store < math.inf:
            raise ConfigError(f"image_store must be a number of GiB, 0 or more, found {self.image_store}")

    def new_store(self) -> ImageStore | None:
        """A store for the images of several questions; None where each computes its own."""
        return ImageStore(math.ceil(self.image_store * GIB)) if self.image_store else None


@dataclass(frozen=True)
class Pipeline:
    """A loaded backbone and how it answers."""

    model: Any
    processor: Any
    template: PromptTemplate
    max_new_tokens: int = 16
    num_frames: int = 8
    """Frames sampled from a video."""
    frame_sampling: str = "linspace"
    """How, see `GenerationSettings`."""
    images: ImageStore | None = None
    """What questions about the same image read it from; None: every question computes its own."""
    segmenter: Segmenter | None = None
    """Makes the masks of answers; None: answers are texts."""

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.device


@dataclass(frozen=True)
class Batch:
    """Encoded questions, left-padded, on the model's device; there may be none."""

    index: int
    question_ids: tuple[str, ...]
    inputs: dict[str, Tensor]
    num_tokens_B: Tensor
    images: Sequence[Sequence[Any]] = ()
    """RGB PIL images of each question."""


def plan_batches(
    pipeline: Pipeline, prompts: Sequence[str], batch_size: int, shown: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """Indices of the questions of each batch: those about one image together, neighbours in prompt length,
    longest first.

    A function of these arguments alone, so that a resumed run forms the same batches. Longest first, so that
    a batch that does not fit in memory fails at the start.

    Parameters
    ----------
    pipeline
        The backbone and how it answers.
    prompts
        Texts, without image placeholders.
    batch_size
        Of all batches but the last.
    shown
        What each question shows; None: nothing is known of that.
    """
    lengths = _token_counts(pipeline.processor.tokenizer, prompts)
    groups = range(len(prompts)) if shown is None else shown
    longest: dict[Hashable, tuple[int, int]] = {}
    for i, group in enumerate(groups):
        longest[group] = min(longest.get(group, (0, i)), (-lengths[i], i))
    order = sorted(range(len(prompts)), key=lambda i: (longest[groups[i]], -lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def shown_by(questions: Sequence[Question]) -> list[Hashable]:
    """What each question shows, equal for those that name the same images or video."""
    return [(question.images, question.video) for question in questions]


def _token_counts(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt; 0 of one that the tokenizer refuses, which is named when it is encoded."""
    try:
        return [len(ids) for ids in tokenizer(list(prompts), add_special_tokens=False)["input_ids"]]
    except Exception as error:
        if len(prompts) == 1 and is_of_sample(error):
            return [0]
        if not is_of_sample(error):
            raise
        return [count for prompt in prompts for count in _token_counts(tokenizer, [prompt])]


def question_images(question: Question, num_frames: int, sampling: str = "linspace") -> list[Any]:
    """RGB PIL images of a question: its images in order, or its video's sampled frames.

    Parameters
    ----------
    question
        As a benchmark gives it.
    num_frames
        Frames sampled from a video.
    sampling
        How, see `GenerationSettings`.
    """
    if question.video is not None:
        return read_frames(question.video, num_frames, sampling)
    return [open_image(source) for source in question.images]


def encode_questions(
    pipeline: Pipeline, questions: Sequence[Question], prompts: Sequence[str], index: int = 0
) -> Batch:
    """One batch of questions, ready to be asked.

    Parameters
    ----------
    pipeline
        The backbone and how it answers.
    questions, prompts
        Of the batch, in order.
    index
        Of the batch.

    Raises
    ------
    DataError
        Naming the questions that cannot be asked, each alone, if the batch cannot.
    """
    try:
        return encode_together(pipeline, questions, prompts, index)
    except Exception as error:
        if is_of_sample(error):
            defects = defects_alone(
                [question.id for question in questions],
                lambda i: encode_together(pipeline, questions[i : i + 1], prompts[i : i + 1], index),
            )
            refuse(defects, len(questions))
        raise


def encode_together(
    pipeline: Pipeline, questions: Sequence[Question], prompts: Sequence[str], index: int = 0
) -> Batch:
    """One batch of questions; raises whatever one of them makes a decoder, template or processor raise.

    Parameters
    ----------
    pipeline
        The backbone and how it answers.
    questions, prompts
        Of the batch, in order.
    index
        Of the batch.
    """
    how = (pipeline.num_frames, pipeline.frame_sampling)
    shown = {(q.images, q.video): question_images(q, *how) for q in questions}
    rows = [shown[q.images, q.video] for q in questions]
    as_videos = all(q.video is not None for q in questions) and takes_videos(pipeline.processor)
    rendered = [
        pipeline.template.render(prompt, has_image=1 if as_videos else len(row))
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    return encode_rendered(
        pipeline, [q.id for q in questions], rendered, rows, as_videos=as_videos, index=index
    )


def encode_rendered(
    pipeline: Pipeline,
    question_ids: Sequence[str],
    rendered: Sequence[RenderedPrompt],
    images: Sequence[Sequence[Any]],
    *,
    as_videos: bool = False,
    index: int = 0,
) -> Batch:
    """One batch from prompts as the template renders them and RGB PIL images (see `backbones.encode`).

    Parameters
    ----------
    pipeline
        The backbone and how it answers.
    question_ids
        Of the batch, in order.
    rendered
        One prompt for each.
    images
        Those of each, in order.
    as_videos
        The images are frames, shown in the backbone's own way.
    index
        Of the batch.
    """
    inputs, _ = encode(pipeline.processor, rendered, images, padding_side="left", as_videos=as_videos)
    num_tokens_B = inputs["attention_mask"].sum(1)
    return Batch(index, tuple(question_ids), _place(inputs, pipeline), num_tokens_B, images)


def _place(inputs: dict[str, Tensor], pipeline: Pipeline) -> dict[str, Tensor]:
    dtype = pipeline.model.dtype
    return {
        name: tensor.to(pipeline.device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }


def encoded_batches(
    pipeline: Pipeline,
    questions: Sequence[Question],
    prompts: Sequence[str],
    plan: Sequence[Sequence[int]],
    wanted: Sequence[int],
    skipped: Collection[str] = (),
) -> Iterator[Batch]:
    """The wanted batches of the plan, without the questions of ids in ``skipped``; the next one is read and
    encoded while the caller works on this one.

    Parameters
    ----------
    pipeline
        The backbone and how it answers.
    questions, prompts
        All, in one order.
    plan
        Indices of the questions of each batch.
    wanted
        Indices of batches.
    skipped
        Ids of questions.
    """

    def make(index: int) -> Batch:
        rows = [i for i in plan[index] if questions[i].id not in skipped]
        if not rows:
            return Batch(index, (), {}, torch.zeros(0, dtype=torch.int64))
        return encode_questions(pipeline, [questions[i] for i in rows], [prompts[i] for i in rows], index)

    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = [pool.submit(make, index) for index in wanted[:1]]
        for position in range(len(wanted)):
            batch = coming.pop().result()
            if position + 1 < len(wanted):
                coming.append(pool.submit(make, wanted[position + 1]))
            yield batch


@torch.inference_mode()
def answer(
    pipeline: Pipeline, batch: Batch, exits: VisualExit, generation: Mapping[str, Any] | None = None
) -> list[Answer]:
    """Answers of one batch under one policy and its reductions.

    They are greedy (`dyvte.backbones.greedy`), unless ``generation`` holds other arguments of ``generate``
    (one sequence for each prompt).

    Parameters
    ----------
    pipeline
        The backbone and how it answers.
    batch
        Encoded questions.
    exits
        The policy and its reductions.
    generation
        Arguments of ``generate``.
    """
    settings = {"max_new_tokens": pipeline.max_new_tokens, **(generation or {})}
    asked = nullcontext() if pipeline.segmenter is None else token_states(pipeline.model)
    with exits(pipeline.model, images=pipeline.images) as run, asked as states:
        run.sample_ids = batch.question_ids
        tokens_BN = generate_greedily(pipeline.model, batch.inputs, **settings)
    new_BA = tokens_BN[:, batch.inputs["input_ids"].shape[1] :].cpu()
    mask_BA = in_answer(new_BA, pipeline.model)
    new_B = [row_A[own_A].tolist() for row_A, own_A in zip(new_BA, mask_BA, strict=True)]
    texts = pipeline.processor.tokenizer.batch_decode(new_B, skip_special_tokens=True)
    if states is not None:
        texts = with_masks(pipeline.segmenter, pipeline.model, batch.images, texts, new_BA, states)
    record = run.records[0] if run.records else _record_of_text(pipeline, batch)
    asked_gates = bool(record.gate_logits_BL.isfinite().any())
    asked_freezes = bool(record.freeze_logits_BL.isfinite().any())
    kv_bytes_B = record.kv_bytes_B.tolist()
    visual_BL, text_BL = record.visual_tokens_BL.tolist(), record.text_tokens_BL.tolist()
    frozen_BL = record.frozen_tokens_BL.tolist()
    return [
        Answer(
            question_id=question_id,
            prediction=text.strip(),  # as LLaVA writes its answers
            exit_layer=int(record.exit_layers_B[row]),
            num_visual=int(record.num_visual_B[row]),
            num_text=int(batch.num_tokens_B[row] - record.num_visual_B[row]),
            visual_tokens=pack_layers(visual_BL[row]),
            text_tokens=pack_layers(text_BL[row]),
            score_layers=tuple(k for k in record.score_layers if visual_BL[row][k - 1]),
            num_new_tokens=len(new_B[row]),
            kv_bytes=kv_bytes_B[row],
            gate_logits=_logits(record.gate_logits_BL[row]) if asked_gates else (),
            freeze_layer=_frozen_before(record, row),
            frozen_tokens=pack_layers(frozen_BL[row]) if any(frozen_BL[row]) else (),
            freeze_logits=_logits(record.freeze_logits_BL[row]) if asked_freezes else (),
        )
        for row, (question_id, text) in enumerate(zip(batch.question_ids, texts, strict=True))
    ]


def _record_of_text(pipeline: Pipeline, batch: Batch) -> PrefillRecord:
    """What a prefill without any image is: every layer processes every token."""
    shape = decoder_shape(pipeline.model.config)
    rows, num_layers = len(batch.question_ids), shape.num_layers
    none_BL = torch.zeros((rows, num_layers), dtype=torch.int64)
    width = 2 * shape.num_kv_heads * shape.head_dim * pipeline.model.dtype.itemsize
    return PrefillRecord(
        exit_layers_B=torch.full((rows,), -1),
        freeze_layers_B=torch.full((rows,), -1),
        gate_logits_BL=torch.full((rows, num_layers), torch.nan),
        freeze_logits_BL=torch.full((rows, num_layers), torch.nan),
        num_visual_B=none_BL[:, 0],
        kv_bytes=(batch.inputs["input_ids"].numel() * width,) * num_layers,
        kv_bytes_alone=(batch.inputs["input_ids"].numel() * width,) * num_layers,
        shared_B=torch.zeros(rows, dtype=torch.bool),
        not_shared=None,
        gate_fallbacks=0,
        visual_tokens_BL=none_BL,
        frozen_tokens_BL=none_BL,
        text_tokens_BL=batch.num_tokens_B.cpu()[:, None].expand(-1, num_layers),
        score_layers=(),
    )


def _frozen_before(record: PrefillRecord, row: int) -> int | None:
    """A row's freeze layer, where it is another than its exit layer."""
    f, k = int(record.freeze_layers_B[row]), int(record.exit_layers_B[row])
    return f if f < k else None


def _logits(logits_L: Tensor) -> tuple[float | None, ...]:
    return tuple(round(x, 6) if math.isfinite(x) else None for x in logits_L.tolist())

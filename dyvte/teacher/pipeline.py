"""From samples to traces on disk: images, prompts, answers, one teacher pass, shards."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dyvte.backbones import PromptTemplate, describe, encode, fingerprint, get_template, weights_digest
from dyvte.data.llava import Defect, Sample, Selection, check_defects
from dyvte.gates import FEATURES
from dyvte.teacher.exits import trace_checked
from dyvte.teacher.labels import greedy_answers
from dyvte.teacher.store import Manifest, Shard, TraceStore, empty_trace
from dyvte.teacher.trace import Trace

LabelSource = Literal["greedy", "data"]
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """How samples are traced.

    ``label_source``: "greedy" traces the full model's own greedy answer (``same_answer`` is then exact,
    ``loss`` is the cross-entropy of that answer); "data" traces the answer the data gives, as the papers do.
    """

    label_source: LabelSource = "greedy"
    """Whose answer is traced."""
    template: str = "auto"
    """Prompt template: "v1", "chat" or "auto"."""
    batch_size: int = 32
    """Samples per forward."""
    exits_per_chunk: int | None = None
    """Exit streams per layer call; null: no call larger than the full pass itself."""
    max_new_tokens: int = 32
    """Longest greedy answer, in tokens."""
    max_length: int = 2048
    """Longest prompt plus answer, in tokens; longer samples are dropped and counted, never cut."""
    shard_batches: int = 8
    """Batches per shard file: what a killed pass loses at most."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "max_length", "shard_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")


class Teacher:
    """A frozen backbone with its processor, ready to trace samples."""

    def __init__(self, model: nn.Module, processor: Any, config: TeacherConfig) -> None:
        self.model, self.processor, self.config = model, processor, config
        self.template: PromptTemplate = get_template(config.template, processor)
        self.backbone = describe(model)
        self.dtype = next(model.parameters()).dtype
        self.device = next(model.parameters()).device

    def fingerprint(self, selection_sha256: str) -> dict[str, str]:
        """One entry per thing that the traces depend on."""
        probe = self.template.render("probe", "answer").text
        images = getattr(self.processor, "image_processor", None)
        image_settings = json.dumps(
            images.to_dict() if images is not None else {}, sort_keys=True, default=str
        )
        labels = self.config.label_source
        return {
            "backbone": fingerprint(self.model),
            "backbone_weights": str(weights_digest(self.model)),
            "data": selection_sha256,
            "prompt": f"{self.template.version} {_digest(probe)}",
            "images": _digest(image_settings),
            "features": "+".join(FEATURES),
            "labels": f"greedy {self.config.max_new_tokens}" if labels == "greedy" else labels,
            "max_length": str(self.config.max_length),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def manifest(self, selection: Selection) -> Manifest:
        """The manifest of a store that holds these samples."""
        return Manifest(
            fingerprint=self.fingerprint(selection.sha256),
            num_samples=len(selection.samples),
            shard_size=self.config.batch_size * self.config.shard_batches,
            num_layers=self.backbone.num_layers,
            feature_size=len(FEATURES) * self.backbone.hidden_size,
        )

    def trace(self, samples: Sequence[Sample], file: str = "") -> tuple[Shard, list[Defect]]:
        """Trace one batch; samples with an unreadable image or too many tokens come back as defects."""
        usable, images, defects = self._open_images(samples, file)
        while usable:
            inputs, answer_BN = self._encode(usable, images)
            room = self.config.max_new_tokens if self.config.label_source == "greedy" else 0
            lengths = (inputs["attention_mask"].sum(1) + room).tolist()
            fits = [length <= self.config.max_length for length in lengths]
            if all(fits):
                break
            defects += [
                _too_long(sample, length, self.config.max_length, file)
                for sample, length, fit in zip(usable, lengths, fits, strict=True)
                if not fit
            ]
            usable = [sample for sample, fit in zip(usable, fits, strict=True) if fit]
            images = [image for image, fit in zip(images, fits, strict=True) if fit]
        if not usable:
            features = len(FEATURES) * self.backbone.hidden_size
            nothing = empty_trace(self.backbone.num_layers, features, self.dtype)
            return Shard(trace=nothing, image_ids=()), defects
        inputs = self._place(inputs)
        notes: dict[str, int] = {}
        if self.config.label_source == "greedy":
            inputs, answer_BN = greedy_answers(self.model, inputs, self.config.max_new_tokens)
            notes = {"answers_cut": self._cut(inputs["input_ids"], answer_BN)}
        trace, is_greedy_B = trace_checked(
            self.model,
            inputs,
            answer_BN,
            sample_ids=[sample.id for sample in usable],
            exits_per_chunk=self.config.exits_per_chunk,
        )
        if self.config.label_source == "greedy":
            notes["answers_not_reproduced"] = int((~is_greedy_B).sum())
        trace = trace.to("cpu")
        trace = Trace(
            **{**trace.tensors(), "features": trace.features.to(self.dtype)}, sample_ids=trace.sample_ids
        )
        return Shard(trace=trace, image_ids=tuple(sample.image_id for sample in usable), notes=notes), defects

    def inputs(self, samples: Sequence[Sample], file: str = "") -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs and answer mask of a batch: with the data's answers, or (greedy labels) prompts only.

        Raises
        ------
        DataError
            If an image cannot be read.
        """
        usable, images, defects = self._open_images(samples, file)
        check_defects(defects, 0)
        inputs, answer_BN = self._encode(usable, images)
        return self._place(inputs), answer_BN.to(self.device)

    def _open_images(
        self, samples: Sequence[Sample], file: str
    ) -> tuple[list[Sample], list[Any], list[Defect]]:
        from PIL import Image

        usable, images, defects = [], [], []
        for sample in samples:
            if sample.image is None:
                defects.append(
                    Defect(file=file, sample_id=sample.id, field="image", problem="the sample has no image")
                )
                continue
            try:
                with Image.open(sample.image) as image:
                    images.append(image.convert("RGB"))
                usable.append(sample)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                problem = f"{sample.image} cannot be read as an image ({error})"
                defects.append(Defect(file=file, sample_id=sample.id, field="image", problem=problem))
        return usable, images, defects

    def _encode(self, samples: Sequence[Sample], images: Sequence[Any]) -> tuple[dict[str, Tensor], Tensor]:
        with_answer = self.config.label_source == "data"
        rendered = [
            self.template.render(sample.question, sample.answer if with_answer else None)
            for sample in samples
        ]
        # Generation needs its prompts padded on the left.
        return encode(self.processor, rendered, [[image] for image in images], padding_side="left")

    def _place(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }

    def _cut(self, input_ids_BN: Tensor, answer_BN: Tensor) -> int:
        """How many answers ended at the token limit instead of an EOS."""
        eos = self.model.generation_config.eos_token_id
        eos_ids = torch.tensor(eos if isinstance(eos, list) else [eos], device=input_ids_BN.device)
        closed_B = (torch.isin(input_ids_BN, eos_ids) & answer_BN).any(1)
        return int((~closed_B).sum())


def write_traces(
    folder: str | Path,
    teacher: Teacher,
    selection: Selection,
    *,
    file: str = "",
    rank: int = 0,
    world_size: int = 1,
    max_bad_samples: int = 0,
    progress: Progress | None = None,
) -> TraceStore:
    """Trace what is not yet in the folder; this rank's share only.

    Ranks take shards in turn. A shard's batches depend on the selection and the batch size alone, so that a
    resumed pass writes the same bytes.

    Parameters
    ----------
    progress:
        Called with the number of samples done since the last call, those found on disk included.

    Raises
    ------
    CheckpointError
        If the folder holds other traces (naming the field) or cannot be written.
    DataError
        If more than ``max_bad_samples`` samples cannot be used.
    """
    store = TraceStore.create(folder, teacher.manifest(selection))
    missing = set(store.missing())
    bad = list(selection.defects)
    for index in range(rank, store.manifest.num_shards, world_size):
        samples = [selection.samples[i] for i in store.manifest.shard_range(index)]
        if index not in missing:
            if progress:
                progress(len(samples))
            continue
        shard, defects = _trace_shard(teacher, samples, file, progress)
        bad += defects
        check_defects(bad, max_bad_samples)
        store.write(index, shard)
    return store


def _trace_shard(
    teacher: Teacher, samples: Sequence[Sample], file: str, progress: Progress | None
) -> tuple[Shard, list[Defect]]:
    """All batches of a shard, neighbours in length together; samples come back in the given order."""
    order = sorted(
        range(len(samples)), key=lambda i: (len(samples[i].question) + len(samples[i].answer), samples[i].id)
    )
    size = teacher.config.batch_size
    parts: list[Shard] = []
    defects: list[Defect] = []
    for start in range(0, len(order), size):
        batch = [samples[i] for i in order[start : start + size]]
        part, bad = teacher.trace(batch, file)
        parts.append(part)
        defects += bad
        if progress:
            progress(len(batch))
    trace = Trace.cat([part.trace for part in parts])
    images = [image for part in parts for image in part.image_ids]
    place = {sample.id: position for position, sample in enumerate(samples)}
    back = sorted(range(len(trace)), key=lambda row: place[trace.sample_ids[row]])
    notes: Counter[str] = Counter()
    for part in parts:
        notes.update(part.notes)
    shard = Shard(
        trace=trace.rows(back),
        image_ids=tuple(images[row] for row in back),
        dropped=tuple(map(str, defects)),
        notes=dict(notes),
    )
    return shard, defects


def _too_long(sample: Sample, length: int, limit: int, file: str) -> Defect:
    problem = f"prompt and answer have {length} tokens, more than max_length {limit}: the answer would be cut"
    return Defect(file=file, sample_id=sample.id, field="conversations", problem=problem)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""The teacher at work on samples: images, prompts, answers, and one pass that sees every exit.

Shape letters: B rows, N tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dyvte.backbones import (
    PromptTemplate,
    RenderedPrompt,
    describe,
    encode,
    fingerprint,
    get_template,
    image_padding,
    weights_digest,
)
from dyvte.data import Defect, Sample, Selection, check_defects, load_image
from dyvte.errors import DataError
from dyvte.gates import DEFAULT_FEATURES, check_features
from dyvte.teacher.exits import trace_checked
from dyvte.teacher.labels import greedy_answers
from dyvte.teacher.store import Manifest, Shard, empty_trace
from dyvte.teacher.trace import Trace

LabelSource = Literal["greedy", "data"]


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
    try_answers: bool = False
    """Greedy labels: pass over the data's answers first and generate only where the model would say something
    else. The same labels; faster where the model is mostly right."""
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
    features: tuple[str, ...] = DEFAULT_FEATURES
    """Kept for the gates: mean_prompt, last_prompt, mean_visual, last_visual; gates may read fewer."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "max_length", "shard_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        check_features(self.features)


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
            "images": f"{image_padding(self.processor)} {_digest(image_settings)}",
            "features": "+".join(self.config.features),
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
            feature_size=len(self.config.features) * self.backbone.hidden_size,
        )

    def trace(self, samples: Sequence[Sample], file: str = "") -> tuple[Shard, list[Defect]]:
        """Trace one batch; samples with an unreadable image or too many tokens come back as defects."""
        usable, images, defects = self._open_images(samples, file)
        greedy = self.config.label_source == "greedy"
        inputs, answer_BN = {}, torch.empty(0)
        while usable:
            inputs, answer_BN = self._encode(usable, images, with_answer=not greedy)
            too_long = self._too_long(usable, inputs, file)
            if not too_long:
                break
            defects += too_long.values()
            images = [image for row, image in enumerate(images) if row not in too_long]
            usable = [sample for row, sample in enumerate(usable) if row not in too_long]
        notes: dict[str, int] = {}
        if not usable:
            features = len(self.config.features) * self.backbone.hidden_size
            trace = empty_trace(self.backbone.num_layers, features, self.dtype)
        elif greedy:
            trace = self._trace_greedy(usable, images, inputs, notes)
        else:
            trace, _ = self._run(usable, inputs, answer_BN)
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
        return self._encode(usable, images, with_answer=self.config.label_source == "data")

    def _trace_greedy(
        self,
        samples: Sequence[Sample],
        images: Sequence[Any],
        prompts: dict[str, Tensor],
        notes: dict[str, int],
    ) -> Trace:
        """Traces of the model's own answers, in the given order."""
        parts: list[Trace] = []
        rest = list(range(len(samples)))
        if self.config.try_answers:
            parts.append(self._trace_confirmed(samples, images, prompts))
            known = set(parts[0].sample_ids)
            rest = [row for row in rest if samples[row].id not in known]
        cut = lost = 0
        if rest:
            chosen = [samples[row] for row in rest]
            if len(rest) < len(samples):
                prompts, _ = self._encode(chosen, [images[row] for row in rest], with_answer=False)
            inputs, answer_BN = greedy_answers(self.model, prompts, self.config.max_new_tokens)
            trace, is_greedy_B = self._run(chosen, inputs, answer_BN)
            cut = int((~self._eos(inputs, answer_BN).any(1)).sum())
            lost = int((~is_greedy_B).sum())
            parts.append(trace)
        notes.update(answers_generated=len(rest), answers_cut=cut, answers_not_reproduced=lost)
        joined = Trace.cat(parts)
        place = {sample_id: row for row, sample_id in enumerate(joined.sample_ids)}
        return joined.rows([place[sample.id] for sample in samples])

    def _trace_confirmed(
        self, samples: Sequence[Sample], images: Sequence[Any], prompts: dict[str, Tensor]
    ) -> Trace:
        """Traces of those samples whose given answer is the model's own, told by the pass over it.

        It is where every answer token is the argmax (then generation would choose the same tokens one by
        one), the tokens before it are the prompt's own, and the one EOS comes last and within the token
        limit.
        """
        inputs, answer_BN = self._encode(samples, images, with_answer=True)
        trace, own_B = self._run(samples, inputs, answer_BN)
        prompt_BN = inputs["attention_mask"].bool() & ~answer_BN
        is_eos_BN = self._eos(inputs, answer_BN)
        for row in range(len(samples)):
            asked = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
            closed = is_eos_BN[row][answer_BN[row]].tolist()
            own_B[row] &= (
                torch.equal(inputs["input_ids"][row][prompt_BN[row]], asked)
                and len(closed) <= self.config.max_new_tokens
                and closed == [False] * (len(closed) - 1) + [True]
            )
        return trace.rows(own_B.nonzero().flatten())

    def _run(
        self, samples: Sequence[Sample], inputs: dict[str, Tensor], answer_BN: Tensor
    ) -> tuple[Trace, Tensor]:
        """One pass: the trace on the CPU, features in the model's dtype; is each answer the argmax?"""
        trace, is_greedy_B = trace_checked(
            self.model,
            inputs,
            answer_BN,
            sample_ids=[sample.id for sample in samples],
            exits_per_chunk=self.config.exits_per_chunk,
            features=self.config.features,
        )
        tensors = {**trace.to("cpu").tensors(), "features": trace.features.to("cpu", self.dtype)}
        return Trace(**tensors, sample_ids=trace.sample_ids), is_greedy_B

    def _too_long(self, samples: Sequence[Sample], inputs: dict[str, Tensor], file: str) -> dict[int, Defect]:
        """Rows whose prompt and answer exceed the length limit."""
        limit = self.config.max_length
        room = self.config.max_new_tokens if self.config.label_source == "greedy" else 0
        lengths = (inputs["attention_mask"].sum(1) + room).tolist()
        problem = "prompt and answer have {} tokens, more than max_length {}: the answer would be cut"
        return {
            row: Defect(
                file=file, sample_id=sample.id, field="conversations", problem=problem.format(length, limit)
            )
            for row, (sample, length) in enumerate(zip(samples, lengths, strict=True))
            if length > limit
        }

    def _open_images(
        self, samples: Sequence[Sample], file: str
    ) -> tuple[list[Sample], list[Any], list[Defect]]:
        usable, images, defects = [], [], []
        for sample in samples:
            where = "conversations"
            try:
                self._render(sample, with_answer=True)  # its text may hold what no prompt can
                where = "image"
                if sample.image is None:
                    raise DataError("the sample has no image")
                images.append(load_image(sample.image))
                usable.append(sample)
            except DataError as error:
                defects.append(Defect(file=file, sample_id=sample.id, field=where, problem=str(error)))
        return usable, images, defects

    def _render(self, sample: Sample, *, with_answer: bool) -> RenderedPrompt:
        return self.template.render(
            sample.question, sample.answer if with_answer else None, history=sample.history
        )

    def _encode(
        self, samples: Sequence[Sample], images: Sequence[Any], *, with_answer: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and answer mask on the model's device, padded on the left as generation needs it."""
        rendered = [self._render(sample, with_answer=with_answer) for sample in samples]
        inputs, answer_BN = encode(
            self.processor, rendered, [[image] for image in images], padding_side="left"
        )
        placed = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }
        return placed, answer_BN.to(self.device)

    def _eos(self, inputs: dict[str, Tensor], answer_BN: Tensor) -> Tensor:
        """(B, N) bool: answer tokens that end a generation."""
        eos = self.backbone.model.generation_config.eos_token_id
        eos_ids = torch.tensor(eos if isinstance(eos, list) else [eos], device=answer_BN.device)
        return torch.isin(inputs["input_ids"], eos_ids) & answer_BN


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

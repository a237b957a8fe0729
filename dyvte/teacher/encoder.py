"""From samples to model inputs: images, prompts, answers, and what cannot become one by name.

Shape letters: B rows, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.backbones import PromptTemplate, RenderedPrompt, encode
from dyvte.backbones.encode import check_prompt
from dyvte.data import Defect, Sample, load_image
from dyvte.data.defects import collected, is_of_sample
from dyvte.errors import DataError
from dyvte.teacher.config import TeacherConfig


@dataclass(frozen=True)
class Prepared:
    """A batch as the model takes it: with the data's answers, or (greedy labels) prompts only."""

    samples: list[Sample]
    images: list[Any]
    inputs: dict[str, Tensor]
    answer_BN: Tensor
    defects: list[Defect]


@dataclass
class SampleEncoder:
    """Makes batches of samples, by one set of rules wherever samples are read.

    Attributes
    ----------
    processor, template, config
        Those of a teacher.
    device, dtype
        Where inputs go, and the precision of images.
    """

    processor: Any
    template: PromptTemplate
    config: TeacherConfig
    device: torch.device
    dtype: torch.dtype

    def prepare(self, samples: Sequence[Sample], file: str = "") -> Prepared:
        """Inputs of those samples that can be used; the rest by name.

        A sample is a defect whose image cannot be read, whose text no template or tokenizer takes, which the
        processor refuses, or which is too long; the others form the batch.

        Parameters
        ----------
        samples
            Of a batch.
        file
            That they are of, for messages.

        Raises
        ------
        Exception
            What the processor raises over samples each of which it takes alone: no sample's fault.
        """
        usable, images, defects = self._open(samples, file)
        inputs, answer_BN = {}, torch.empty(0)
        while usable:
            try:
                inputs, answer_BN = self.encode(usable, images, with_answer=self._labels_are_data)
            except Exception as error:
                if not is_of_sample(error):
                    raise
                bad = self._refused(usable, images, file)
                if not bad:
                    raise
            else:
                bad = self._too_long(usable, inputs, file)
                if not bad:
                    break
            defects += bad.values()
            images = [image for row, image in enumerate(images) if row not in bad]
            usable = [sample for row, sample in enumerate(usable) if row not in bad]
        return Prepared(usable, images, inputs if usable else {}, answer_BN, defects)

    def encode(
        self, samples: Sequence[Sample], images: Sequence[Any], *, with_answer: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and answer mask on the model's device, padded on the left as generation needs it.

        Parameters
        ----------
        samples
            Of a batch.
        images
            One for each.
        with_answer
            Let the answer follow the prompt.
        """
        rendered = [self._render(sample, with_answer=with_answer) for sample in samples]
        inputs, answer_BN = encode(
            self.processor, rendered, [[image] for image in images], padding_side="left"
        )
        placed = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }
        return placed, answer_BN.to(self.device)

    @property
    def _labels_are_data(self) -> bool:
        return self.config.label_source != "greedy"

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

    def _open(self, samples: Sequence[Sample], file: str) -> tuple[list[Sample], list[Any], list[Defect]]:
        """Samples whose texts can be read by the tokenizer and whose image can be opened, with the images."""
        usable: list[Sample] = []
        images: list[Any] = []
        defects: list[Defect] = []
        for sample in samples:
            of = {"file": file, "sample_id": sample.id}
            known = len(defects)
            # Its answer too, whoever's answers are traced: which samples are used must not depend on that.
            with collected(defects, **of, field="conversations"):
                check_prompt(self.processor, self._render(sample, with_answer=True))
            if len(defects) > known:
                continue
            with collected(defects, **of, field="image"):
                if sample.image is None:
                    raise DataError("the sample has no image")
                images.append(load_image(sample.image))
                usable.append(sample)
        return usable, images, defects

    def _refused(self, samples: Sequence[Sample], images: Sequence[Any], file: str) -> dict[int, Defect]:
        """Rows that cannot be encoded by themselves either."""
        bad: dict[int, Defect] = {}
        for row, (sample, image) in enumerate(zip(samples, images, strict=True)):
            found: list[Defect] = []
            with collected(found, file=file, sample_id=sample.id, field="image"):
                self.encode([sample], [image], with_answer=self._labels_are_data)
            bad.update((row, defect) for defect in found)
        return bad

    def _render(self, sample: Sample, *, with_answer: bool) -> RenderedPrompt:
        answer = sample.answer if with_answer else None
        return self.template.render(sample.question, answer, history=sample.history, system=sample.system)

"""Forward passes whose attention weights are looked at, layer by layer.

Shape letters: B rows, N tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dyvte.analysis.subject import Subject
from dyvte.backbones import Backbone, visual_places, watched_attention
from dyvte.errors import DataError
from dyvte.runtime.vision_calls import VisionCalls
from dyvte.spans import Spans, find_spans
from dyvte.teacher import greedy_answers
from dyvte.teacher.plain import forward_inputs

KINDS = ("system", "visual", "instruction", "output")
"""VTW's kinds: text before the image; visual tokens; all other text before the answer; the answer."""


@dataclass(frozen=True)
class Watched:
    """One batch under watch; masks are on the CPU.

    Attributes
    ----------
    question_ids
        One for each row.
    input_ids_BN
        On the CPU.
    spans
        Where image, prompt and answer sit.
    """

    question_ids: tuple[str, ...]
    input_ids_BN: Tensor
    spans: Spans
    backbone: Backbone
    vision: VisionCalls

    @cached_property
    def places_BN3(self) -> Tensor:
        """Image, row and column of every visual token; -1 elsewhere. To be asked for during the pass."""
        return visual_places(self.backbone, self.spans.visual_BN, self.vision)

    @cached_property
    def kinds_BN4(self) -> Tensor:
        """(B, N, 4) float32: is the token of that kind?"""
        spans = self.spans
        known_BN = spans.prefix_BN | spans.visual_BN | spans.answer_BN
        instruction_BN = spans.valid_BN & ~known_BN
        return torch.stack([spans.prefix_BN, spans.visual_BN, instruction_BN, spans.answer_BN], -1).float()

    @cached_property
    def first_BN(self) -> Tensor:
        """(B, N) bool: the first token of the row, where it is text."""
        valid_BN = self.spans.valid_BN
        return valid_BN & (valid_BN.cumsum(1) == 1) & ~self.spans.visual_BN


See = Callable[[Watched, int, Tensor], None]


class Watcher(ABC):
    """What a study adds up while it watches; `see` is what `watch` calls."""

    @abstractmethod
    def see(self, batch: Watched, index: int, weights_BNN: Tensor) -> None:
        """Add a layer of a batch.

        Parameters
        ----------
        batch
            The prompts, and where their visual tokens sit.
        index
            Of the layer, from 0.
        weights_BNN
            (B, queries, keys) attention, mean over heads.
        """


@torch.no_grad()
def watch(subject: Subject, see: See, *, answered: bool = False) -> None:
    """Call ``see(batch, index, weights_BNN)`` for every layer of a pass over the sampled questions.

    ``index`` counts from 0. Weights are the mean over heads, float32, on the CPU. With ``answered`` the
    model's own greedy answer follows each prompt: its rows are what the steps of a generation would show,
    since later tokens change nothing before them.

    Parameters
    ----------
    subject
        The backbone, and the questions sampled.
    see
        Called for every layer.
    answered
        Let an answer follow each prompt.

    Raises
    ------
    DataError
        If a question has no visual tokens.
    """
    backbone = subject.backbone
    for batch in subject.batches():
        inputs: dict[str, Any] = batch.inputs
        answer_BN = None
        if answered:
            inputs, answer_BN = greedy_answers(subject.pipeline.model, inputs, subject.config.max_new_tokens)
        spans = find_spans(
            inputs["input_ids"].cpu(),
            backbone.visual_token_ids,
            inputs["attention_mask"].cpu(),
            None if answer_BN is None else answer_BN.cpu(),
        )
        blind = [i for i, sees in zip(batch.question_ids, spans.visual_BN.any(1).tolist()) if not sees]
        if blind:
            raise DataError(f"questions {blind[:5]} have no visual tokens: their attention says nothing")
        vision = VisionCalls(backbone.path)
        watched = Watched(batch.question_ids, inputs["input_ids"].cpu(), spans, backbone, vision)
        try:
            with watched_attention(
                backbone,
                lambda index, weights, at=watched: see(at, index, weights.mean(1, dtype=torch.float32).cpu()),
            ):
                given = forward_inputs(backbone, inputs, spans.valid_BN.to(inputs["input_ids"].device))
                subject.pipeline.model(**given, use_cache=False, logits_to_keep=1)
        finally:
            for undo in vision.undo:
                undo()

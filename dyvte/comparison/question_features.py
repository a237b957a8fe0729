"""What a question-only router may read: words, or the backbone's states of the prompt without the image.

Shape letters: B questions, N tokens, D hidden, F features.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.backbones import describe, encode
from dyvte.evaluation.generation import Pipeline
from dyvte.gates import prompt_features

Featurise = Callable[[Sequence[str]], Tensor]
"""Maps B questions to (B, F) features."""

_BATCH_SIZE = 128


@dataclass(frozen=True)
class BagOfWords:
    """Word counts of a question; words not seen when fitting share the last column."""

    words: tuple[str, ...]

    @staticmethod
    def fit(questions: Sequence[str], max_words: int = 2000) -> BagOfWords:
        """Take the most frequent words.

        Parameters
        ----------
        questions
            To learn from.
        max_words
            Of the vocabulary.
        """
        counts = Counter(word for question in questions for word in _words(question))
        return BagOfWords(tuple(sorted(word for word, _ in counts.most_common(max_words))))

    def __call__(self, questions: Sequence[str]) -> Tensor:
        """(B, F) float32 counts."""
        columns = {word: column for column, word in enumerate(self.words)}
        features = torch.zeros(len(questions), len(self.words) + 1)
        for row, question in enumerate(questions):
            for word in _words(question):
                features[row, columns.get(word, len(columns))] += 1
        return features


def _words(question: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", question.lower())


def router_features(pipeline: Pipeline, questions: Sequence[str]) -> dict[str, Featurise]:
    """The two kinds of input a router is tried with, by name; ``questions`` are those it learns from.

    Features of a list of questions are kept: every seed asks for the same ones.

    Parameters
    ----------
    pipeline
        The backbone and how it answers.
    questions
        To learn from.
    """
    kinds = {"bag of words": BagOfWords.fit(questions), "text states": TextStates.of(pipeline)}
    return {kind: _remembering(featurise) for kind, featurise in kinds.items()}


def _remembering(featurise: Featurise) -> Featurise:
    known: dict[tuple[str, ...], Tensor] = {}

    def remembered(questions: Sequence[str]) -> Tensor:
        key = tuple(questions)
        if key not in known:
            known[key] = featurise(key)
        return known[key]

    return remembered


def state_layers(num_layers: int, count: int = 4) -> tuple[int, ...]:
    """``count`` layers evenly up the stack, the last one included.

    Parameters
    ----------
    num_layers
        L.
    count
        How many.
    """
    return tuple(sorted({max(1, round(num_layers * (i + 1) / count)) for i in range(count)}))


@dataclass(frozen=True)
class TextStates:
    """The backbone's states of the same prompt, image removed: mean and last token after several layers.

    Each distinct question is passed through the backbone once.
    """

    pipeline: Pipeline
    layers: tuple[int, ...]

    @staticmethod
    def of(pipeline: Pipeline) -> TextStates:
        """States after a quarter, half, three quarters and all of the layers."""
        return TextStates(pipeline, state_layers(describe(pipeline.model).num_layers))

    def __call__(self, questions: Sequence[str]) -> Tensor:
        """(B, F) float32, F = 2 D x layers."""
        distinct = sorted(set(questions), key=lambda question: (len(question), question))
        parts = [
            self._states(distinct[start : start + _BATCH_SIZE])
            for start in range(0, len(distinct), _BATCH_SIZE)
        ]
        row = {question: i for i, question in enumerate(distinct)}
        return torch.cat(parts)[[row[question] for question in questions]]

    @torch.no_grad()
    def _states(self, questions: Sequence[str]) -> Tensor:
        rendered = [self.pipeline.template.render(question, has_image=False) for question in questions]
        inputs, _ = encode(self.pipeline.processor, rendered, [[]] * len(questions), padding_side="right")
        inputs = {name: tensor.to(self.pipeline.device) for name, tensor in inputs.items()}
        output = self.pipeline.model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        mask_BN = inputs["attention_mask"].bool()
        states = [prompt_features(output.hidden_states[k], mask_BN) for k in self.layers]
        return torch.cat(states, 1).float().cpu()

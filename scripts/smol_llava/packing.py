"""A scene and its natural questions as one packed row in the chat form; a function of its arguments alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dyvte.data.scenes.natural import Question, ask_natural
from dyvte.data.scenes.render import render
from dyvte.data.scenes.world import Scene, draw_scene
from smol_llava.decoder import Layout

MAX_GROUP = 8
PADDING_SHARE = 0.8
"""A question joins a group when it is at least this share of the group's longest."""
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"


@dataclass
class Row:
    """One packed scene. `tokens` and `labels` (-100: none) hold the questions' part of the row, flat."""

    image: np.ndarray
    layout: Layout
    tokens: torch.Tensor
    labels: torch.Tensor
    owner: torch.Tensor
    """Which question a token belongs to, in the order of `questions`."""
    questions: list[Question]

    @property
    def wanted(self) -> torch.Tensor:
        """Where a label is, (N - P,)."""
        return self.labels >= 0


class Packer:
    """Turns scenes and texts into token rows; owns the tokenizer."""

    def __init__(self, tokenizer, visual_tokens: int):
        self.fast = tokenizer._tokenizer
        stand_in = "<image>"
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        before, after = chat.split(stand_in)
        line_break, tail = after.split("Q")
        if tail != TAIL:
            raise ValueError(f"the chat template ends a question with {tail!r}, expected {TAIL!r}")
        self.before, self.after = (torch.tensor(self.ids(t)) for t in (before, line_break))
        self.visual = slice(len(self.before), len(self.before) + visual_tokens)
        self.prefix = self.visual.stop + len(self.after)

    def ids(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added."""
        return self.fast.encode(text, add_special_tokens=False).ids

    def row(self, scene: Scene, questions: Sequence[Question]) -> Row:
        """All questions of a scene, sorted by length into groups that share one padded width."""
        texts = [q.text + TAIL for q in questions] + [q.answer + END for q in questions]
        encoded = [e.ids for e in self.fast.encode_batch(texts, add_special_tokens=False)]
        pairs = list(zip(encoded[: len(questions)], encoded[len(questions) :], strict=True))
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        groups: list[list[int]] = []
        width = 0
        for i in order:
            # the closing token is a label alone, never an input
            length = len(pairs[i][0]) + len(pairs[i][1]) - 1
            if groups and len(groups[-1]) < MAX_GROUP and length >= PADDING_SHARE * width:
                groups[-1].append(i)
            else:
                width = length
                groups.append([i])
        tokens, labels, owner, shape = [], [], [], []
        for group in groups:
            width = sum(map(len, pairs[group[0]])) - 1
            ids = torch.zeros(len(group), width, dtype=torch.long)
            target = torch.full_like(ids, -100)
            for line, i in enumerate(group):
                prompt, answer = pairs[i]
                whole = torch.tensor(prompt + answer)
                ids[line, : len(whole) - 1] = whole[:-1]
                target[line, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
            tokens.append(ids.flatten())
            labels.append(target.flatten())
            owner.append(torch.tensor(group).repeat_interleave(width))
            shape.append((len(group), width))
        return Row(
            image=render(scene),
            layout=Layout(self.prefix, tuple(shape)),
            tokens=torch.cat(tokens),
            labels=torch.cat(labels),
            owner=torch.cat(owner),
            questions=list(questions),
        )

    def scene_row(
        self, split: str, index: int, count: int, kinds: Sequence[str], seed: int = 0, **asking
    ) -> Row:
        """`count` questions about scene number `index` of `split`."""
        scene = draw_scene(split, index, seed)
        rng = np.random.default_rng([seed, 303, index])
        return self.row(scene, ask_natural(scene, rng, count, kinds, **asking))

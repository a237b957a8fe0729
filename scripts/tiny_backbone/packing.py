"""Many questions about one image in one training row.

Layout of a row: [<s> user] [visual tokens] [question 1] ... [question Q]. Every question attends to the
prefix and to itself only, and its positions start where the prefix ends, so each is trained exactly as if
it stood alone, while the image is processed once. Questions are sorted by length into groups that share
one padded width.

Shapes: B scenes, Q questions per scene, P prefix length, T padded question width, H heads, d head size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from dyvte.data.scenes.questions import ask_many, content
from dyvte.data.scenes.render import render
from dyvte.data.scenes.world import GRID, Scene, draw_scene

GROUP = 8  # questions per group
_WORD = re.compile(r"<[a-z/]+>|\w+|[^\w\s]")


@dataclass
class Batch:
    """`tokens`/`labels` one (B, GROUP, T) pair per group; `exits` (B, GROUP) per group or None."""

    images: np.ndarray
    tokens: list[torch.Tensor]
    labels: list[torch.Tensor]
    types: np.ndarray  # (B, Q) names, in packed order
    exits: list[torch.Tensor] | None = None


def describe_rows(scene: Scene, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Dense captions of `count` rows: training only; they ground every visual token quickly."""
    rows = [int(r) for r in rng.permutation(GRID)[:count]]
    return [
        (f"Describe row {r + 1}.", ", ".join(content(c) for c in scene.cells[r * GRID : (r + 1) * GRID]))
        for r in rows
    ]


def tokenize(text: str, vocabulary: dict[str, int]) -> list[int]:
    """The embedded tokenizer's rule without its overhead (a test holds the two together)."""
    return [vocabulary[w] for w in _WORD.findall(text.lower())]


def make_batch(
    split: str, first: int, scenes: int, questions: int, describes: int, vocabulary: dict[str, int], seed: int
) -> Batch:
    """Scenes `first .. first + scenes` of `split` with their questions; a function of its arguments alone."""
    images, rows = [], []
    for index in range(first, first + scenes):
        scene = draw_scene(split, index, seed)
        rng = np.random.default_rng([seed, 77, index])
        asked = [("describe", text, answer) for text, answer in describe_rows(scene, rng, describes)]
        asked += [(q.type, q.text, q.answer) for q in ask_many(scene, rng, questions - describes)]
        while len(asked) < questions:
            asked.append(asked[-1])
        packed = []
        for kind, text, answer in asked:
            prompt = tokenize(f"{text} assistant", vocabulary)
            packed.append((prompt, tokenize(f"{answer}</s>", vocabulary), kind))
        packed.sort(key=lambda p: len(p[0]) + len(p[1]))
        images.append(render(scene))
        rows.append(packed)
    tokens, labels = [], []
    for start in range(0, questions, GROUP):
        width = max(len(p) + len(a) for row in rows for p, a, _ in row[start : start + GROUP])
        ids = torch.zeros(scenes, GROUP, width, dtype=torch.long)
        target = torch.full((scenes, GROUP, width), -100)
        for b, row in enumerate(rows):
            for q, (prompt, answer, _) in enumerate(row[start : start + GROUP]):
                whole = torch.tensor(prompt + answer)
                ids[b, q, : len(whole)] = whole
                target[b, q, len(prompt) : len(whole)] = whole[len(prompt) :]
        tokens.append(ids)
        labels.append(target)
    types = np.array([[kind for _, _, kind in row] for row in rows])
    return Batch(images=np.stack(images), tokens=tokens, labels=labels, types=types)


def _future(width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((width, width), float("-inf"), dtype=dtype).triu(1)


def _causal(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    # at this size explicit scores are faster than the flash kernel's backward on a CPU
    scores = query @ key.transpose(-1, -2)
    return (scores + _future(query.shape[2], scores.dtype)).softmax(-1)


class PackedAttention:
    """Attention function for `AttentionInterface.register`: prefix causal, questions see prefix and self.

    Set `widths` (T of each group) and `exits` (None, or one (B, GROUP) tensor per group with the number of
    layers that let the question see the visual tokens) before the forward.
    """

    def __init__(self, prefix_text: int, visual: int):
        self.prefix_text, self.visual = prefix_text, visual
        self.widths: list[int] = []
        self.exits: list[torch.Tensor] | None = None

    def __call__(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        """Attention of one layer: (B, H, N, d) in, (B, N, H, d) out."""
        prefix = self.prefix_text + self.visual
        b, h, _, d = query.shape
        scale = d**-0.5 if scaling is None else scaling
        kp, vp = key[:, :, :prefix], value[:, :, :prefix]
        out = [_causal(query[:, :, :prefix] * scale, kp) @ vp]
        start = prefix
        for group, width in enumerate(self.widths):
            stop = start + GROUP * width
            shape = (b, h, GROUP, width, d)
            q, k, v = (x[:, :, start:stop] for x in (query, key, value))
            q = q * scale
            to_prefix = (q @ kp.transpose(-1, -2)).view(b, h, GROUP, width, prefix)
            if self.exits is not None:
                gone = (self.exits[group] <= module.layer_idx)[:, None, :, None, None]
                visual = torch.arange(prefix) >= self.prefix_text
                to_prefix = to_prefix.masked_fill(gone & visual, float("-inf"))
            to_self = q.reshape(shape) @ k.reshape(shape).transpose(-1, -2)
            to_self = to_self + _future(width, to_self.dtype)
            weights = torch.cat([to_prefix, to_self], dim=-1).softmax(-1)
            w_prefix = weights[..., :prefix].reshape(b, h, GROUP * width, prefix)
            mixed = w_prefix @ vp + (weights[..., prefix:] @ v.reshape(shape)).reshape(b, h, GROUP * width, d)
            out.append(mixed)
            start = stop
        return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def install(attention: PackedAttention, model) -> None:
    """Make `model`'s decoder use `attention`; masks are its business, so none is built."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("dyvte_packed", attention)
    AttentionMaskInterface.register("dyvte_packed", lambda *args, **kwargs: None)
    model.model.language_model.config._attn_implementation = "dyvte_packed"


def packed_loss(
    model, attention: PackedAttention, features_BVD: torch.Tensor, batch: Batch, prefix_ids
) -> dict:
    """Cross-entropy over all answer tokens, and how many answers are right to the last token."""
    language, head = model.model.language_model, model.lm_head
    embed = language.embed_tokens
    b = features_BVD.shape[0]
    prefix = torch.cat([embed(prefix_ids).expand(b, -1, -1), features_BVD], dim=1)
    flat = torch.cat([t.reshape(b, -1) for t in batch.tokens], dim=1)
    hidden = torch.cat([prefix, embed(flat)], dim=1)
    start = prefix.shape[1]
    positions = [torch.arange(start)]
    positions += [torch.arange(start, start + t.shape[2]).repeat(GROUP) for t in batch.tokens]
    attention.widths = [t.shape[2] for t in batch.tokens]
    attention.exits = batch.exits
    out = language(inputs_embeds=hidden, position_ids=torch.cat(positions)[None], use_cache=False)
    states = out.last_hidden_state[:, start:]
    losses, right, offset = [], [], 0
    for labels in batch.labels:
        size = GROUP * labels.shape[2]
        group = states[:, offset : offset + size].reshape(*labels.shape, -1)
        offset += size
        target = labels[:, :, 1:]
        wanted = target >= 0
        logits = head(group[:, :, :-1][wanted]).float()
        losses.append(F.cross_entropy(logits, target[wanted], reduction="none"))
        hit = torch.ones_like(target, dtype=torch.bool)
        hit[wanted] = logits.argmax(-1) == target[wanted]
        right.append(hit.all(-1))
    return {"loss": torch.cat(losses).mean(), "right": torch.cat(right, dim=1)}

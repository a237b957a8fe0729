"""What a training state can do: accuracy by type, shuffled images, unseen wordings, exits, perplexity.

An answer counts when every token of it, the closing one included, is the most likely one given the true
answer so far: that is, when greedy decoding gives exactly the true answer. Boxes also count by IoU >= 0.5.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from smol_llava.network import Network
from smol_llava.text import TextSet, text_loss

PLAIN_ENGLISH = Path(__file__).with_name("plain_english.txt")
FIRST_SCENE = 60_000_000


@torch.no_grad()
def accuracy(
    network: Network,
    split: str,
    scenes: int,
    kinds: Sequence[str],
    *,
    questions: int = 24,
    shuffle: bool = False,
    unseen: bool = False,
    exits: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[int, dict[str, float]]:
    """Accuracy per type, by exit layer.

    Parameters
    ----------
    shuffle
        Ask every question about the picture of the next scene.
    unseen
        Ask in wordings that training never used.
    exits
        Exit layers; None: the full model only.
    """
    decoder, depth = network.decoder, len(network.decoder.layers)
    exits = [depth] if exits is None else list(exits)
    hits = {k: defaultdict(list) for k in exits}
    rows = [
        network.packer.scene_row(split, FIRST_SCENE + i, questions, kinds, seed, unseen=unseen)
        for i in range(scenes)
    ]
    for i, row in enumerate(rows):
        image = rows[(i + 1) % scenes].image if shuffle else row.image
        inputs = network.inputs(row, network.visual(image))
        states = decoder.with_exits(inputs, row.layout, network.packer.visual, exits)
        for k in exits:
            logits = decoder.logits(states[k][row.wanted])
            for question, right in zip(row.questions, network.right(row, logits), strict=True):
                hits[k][question.type].append(bool(right))
                if question.type == "box":
                    hits[k]["box IoU>=0.5"].append(_box_hit(network, row, question, logits))
    return {k: {t: float(np.mean(h)) for t, h in sorted(found.items())} for k, found in hits.items()}


def _box_hit(network: Network, row, question, logits: torch.Tensor) -> bool:
    """Whether the box read by teacher forcing fits: an estimate, decoding goes on from its own digits."""
    number = next(i for i, q in enumerate(row.questions) if q is question)
    mine = row.owner[row.wanted] == number
    text = network.packer.fast.decode(logits[mine].argmax(-1).tolist())
    guess, truth = ([float(v) for v in re.findall(r"\d\.\d+", t)] for t in (text, question.answer))
    return len(guess) == 4 and iou(guess, truth) >= 0.5


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    areas = sum(max(0.0, x[2] - x[0]) * max(0.0, x[3] - x[1]) for x in (a, b))
    return both / (areas - both) if both else 0.0


@torch.no_grad()
def perplexity(network: Network, path: Path = PLAIN_ENGLISH) -> dict[str, float]:
    """Perplexity on plain English, paragraph by paragraph, without and with the adapters."""
    paragraphs = [p.strip() for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()]
    start = network.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    found = {}
    for name, adapted in (("original", False), ("adapted", True)):
        network.decoder.adapted = adapted
        total, count = 0.0, 0
        for text in paragraphs:
            ids = torch.tensor([start, *network.packer.ids(text)])
            total += F.cross_entropy(network.text_logits(ids[:-1]), ids[1:], reduction="sum").item()
            count += len(ids) - 1
        found[name] = float(np.exp(total / count))
    return {**found, "ratio": found["adapted"] / found["original"]}


@torch.no_grad()
def text_kl(network: Network, texts: TextSet, count: int = 32) -> float:
    """Mean KL(original || adapted) on what the original wrote."""
    losses = [
        text_loss(network.text_logits(texts.ids[i, :-1]), texts.top[i], texts.log_odds[i]).item()
        for i in range(len(texts.ids) - count, len(texts.ids))
    ]
    return float(np.mean(losses))


def mean_over_types(scores: dict[str, float]) -> float:
    """Mean over question types; the box's second score is no type."""
    return float(np.mean([v for t, v in scores.items() if " " not in t]))


def verdict(full: dict, shuffled: dict, unseen: dict, exits: dict[int, dict], english: dict) -> dict:
    """The required figures, each with what was measured."""
    simple = ("background", "existence", "color", "shape", "cell")
    kept = [t for t in full if " " not in t and full[t] - shuffled.get(t, 0.0) >= 0.2]
    early = max((mean_over_types(v) for k, v in exits.items() if k <= 8), default=float("nan"))
    overall = float(np.mean([full[t] for t in kept])) if kept else 0.0
    return {
        "kept_types": kept,
        "not_kept": [t for t in full if " " not in t and t not in kept],
        "simple_worst": min(full.get(t, 0.0) for t in simple),
        "kept_mean": overall,
        "mean": mean_over_types(full),
        "shuffled_mean": mean_over_types(shuffled),
        "unseen_drop": float(np.mean([full[t] - unseen[t] for t in kept if t in unseen])) if kept else 0.0,
        "best_at_k_up_to_8_over_full": early / max(mean_over_types(full), 1e-9),
        "perplexity_ratio": english["ratio"],
    }

"""Text-only instructions: what the original decoder itself writes, with its own odds, cached once.

The decoder writes both sides of a chat (it is sampled from the start of a user turn on) and plain text. Its
most likely tokens and their log-odds at every position are kept; in training the adapted decoder is held to
them by KL(original || adapted), so that it stays a language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

TOP = 32
"""Most likely tokens kept per position; the rest counts as one bucket."""
_STARTS = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n",
    "<|endoftext|>",
)
_OPENINGS = (
    *("The", "In", "A", "It was", "When", "This", "How", "There are", "If you", "She", "He", "We", "They"),
    *(
        "People",
        "One of the",
        "During",
        "As",
        "To",
        "Most",
        "History",
        "Science",
        "The city",
        "Every",
        "After",
    ),
)


@dataclass
class TextSet:
    """`ids` (S, N); `top` and `log_odds` (S, N - 1, TOP): the original's opinion of token n + 1 after n."""

    ids: torch.Tensor
    top: torch.Tensor
    log_odds: torch.Tensor

    def save(self, path: Path) -> None:
        """Write as safetensors; ids fit 16 bits, the file stays small."""
        from safetensors.torch import save_file

        packed = {"ids": self.ids.int(), "top": self.top.int(), "log_odds": self.log_odds.half()}
        draft = path.with_suffix(".part")
        save_file(packed, draft)
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> TextSet:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        found = load_file(path)
        return cls(found["ids"].long(), found["top"].long(), found["log_odds"].float())


def text_loss(logits: torch.Tensor, top: torch.Tensor, log_odds: torch.Tensor) -> torch.Tensor:
    """Mean KL(original || adapted) over positions, the tail beyond TOP as one bucket."""
    ours = F.log_softmax(logits, -1).gather(-1, top)
    theirs = log_odds
    tail_theirs = (1 - theirs.exp().sum(-1)).clamp_(min=1e-6)
    tail_ours = (1 - ours.exp().sum(-1)).clamp(min=1e-6)
    inside = (theirs.exp() * (theirs - ours)).sum(-1)
    return (inside + tail_theirs * (tail_theirs.log() - tail_ours.log())).mean()


@torch.no_grad()
def write_texts(
    folder: Path, *, texts: int, length: int, seed: int, log, batch: int = 64, temperature: float = 0.7
) -> TextSet:
    """Let the original decoder write `texts` texts of `length` tokens; half are chats."""
    from transformers import AutoModelForCausalLM, DynamicCache

    from dyvte.backbones.smol_llava import build_tokenizer

    tokenizer = build_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    made: list[TextSet] = []
    for start in range(0, texts, batch):
        chat = (start // batch) % 2 == 0
        lines = [_STARTS[0] if chat else _STARTS[1]] * batch
        if not chat:  # rows of one batch need one length: openings of a single token
            openings = [o for o in _OPENINGS if len(tokenizer(o, add_special_tokens=False).input_ids) == 1]
            lines = [line + openings[i % len(openings)] for i, line in enumerate(lines)]
        ids = tokenizer(lines, add_special_tokens=False, return_tensors="pt").input_ids
        cache, fed = DynamicCache(config=model.config), ids
        top: list[torch.Tensor] = []
        odds: list[torch.Tensor] = []
        while True:
            step = F.log_softmax(model(input_ids=fed, past_key_values=cache).logits.float(), -1)
            likely = step.topk(TOP, -1)
            top.append(likely.indices)
            odds.append(likely.values)
            if ids.shape[1] == length:
                break
            odds_next = F.softmax(step[:, -1] / temperature, -1)
            fed = torch.multinomial(odds_next, 1, generator=generator)
            ids = torch.cat([ids, fed], 1)
        made.append(TextSet(ids, torch.cat(top, 1)[:, :-1], torch.cat(odds, 1)[:, :-1]))
        log(
            {
                "stage": "texts",
                "written": min(texts, start + batch),
                "sample": tokenizer.decode(ids[0])[-160:],
            }
        )
    return TextSet(*(torch.cat([getattr(m, n) for m in made])[:texts] for n in ("ids", "top", "log_odds")))

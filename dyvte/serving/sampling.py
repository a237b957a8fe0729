"""Each row's own choice of tokens, inside the one greedy generation: drawing, and log-probabilities.

`dyvte.backbones.greedy` takes the argmax. A row that is drawn gets scores of which the drawn token is the
argmax, so that greedy rows beside it are what they are alone.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from dyvte.serving.jobs import Decoding, TokenLogprob

# Between the seeds of a request's answers, so that those of seeds 0 and 1 have none in common.
_STEP = 0x9E3779B97F4A7C15


class RowChoice:
    """How one answer's tokens are chosen, and what is recorded of them.

    Parameters
    ----------
    decoding
        The request's.
    choice
        Which of its answers: each draws by itself.

    Attributes
    ----------
    logprobs
        Of the tokens so far, if asked for.
    is_over
        Has the answer ended? Nothing is chosen then.
    """

    def __init__(self, decoding: Decoding, choice: int) -> None:
        self.decoding = decoding
        seed = secrets.randbits(63) if decoding.seed is None else decoding.seed
        self._generator = torch.Generator().manual_seed((seed + _STEP * choice) % 2**63)
        self.logprobs: list[TokenLogprob] = []
        self.is_over = False

    @property
    def is_plain(self) -> bool:
        """Is it greedy, and is nothing recorded?"""
        return self.decoding.temperature == 0 and self.decoding.top_logprobs is None

    def take(self, scores_V: Tensor) -> int | None:
        """The token that is drawn, None for the argmax; its log-probability is recorded if asked for."""
        drawn = self._draw(scores_V) if self.decoding.temperature > 0 else None
        if self.decoding.top_logprobs is not None:
            token = int(scores_V.argmax()) if drawn is None else drawn
            logprobs_V = scores_V.float().log_softmax(-1)
            top = logprobs_V.topk(min(self.decoding.top_logprobs, len(logprobs_V)))
            pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            self.logprobs.append(TokenLogprob(token, float(logprobs_V[token]), pairs))
        return drawn

    def _draw(self, scores_V: Tensor) -> int:
        # On the CPU in float64: the same seed draws the same token on every machine that scores alike.
        chances_V = (scores_V.cpu().double() / self.decoding.temperature).softmax(-1)
        if self.decoding.top_p < 1:
            ordered_V, order_V = chances_V.sort(descending=True, stable=True)
            kept_V = ordered_V.cumsum(0) - ordered_V < self.decoding.top_p
            chances_V = torch.zeros_like(chances_V).index_put((order_V,), ordered_V * kept_V)
        return int(torch.multinomial(chances_V, 1, generator=self._generator))


class ChooseByRow(LogitsProcessor):
    """Puts every row's own choice into the scores that the argmax is taken of.

    Parameters
    ----------
    choices
        One for each row, in order.
    failed
        Row to what its choice raised: that row alone is given up.
    """

    def __init__(self, choices: Sequence[RowChoice], failed: dict[int, Exception]) -> None:
        self.choices, self.failed = choices, failed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of which each row's token is the argmax."""
        for row, choice in enumerate(self.choices):
            if choice.is_plain or choice.is_over or row in self.failed:
                continue
            try:
                drawn = choice.take(scores[row])
            except Exception as error:
                self.failed[row] = error
                continue
            if drawn is not None:
                scores[row] = float("-inf")
                scores[row, drawn] = 0.0
        return scores

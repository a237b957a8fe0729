"""What a gate reads. Shapes: B rows, N tokens, D hidden size, L layers, P feature parts, F = P D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyvte.errors import ConfigError

FEATURES = ("mean_prompt", "last_prompt", "mean_visual", "last_visual")
"""All parts there are: DyVTE's inputs (its Tables 4 and 7), in the order of the weights below."""
DEFAULT_FEATURES = ("mean_prompt", "last_prompt")
"""DyVTE, Eq. 1."""


def check_features(names: Sequence[str]) -> tuple[str, ...]:
    """``names`` as a tuple.

    Parameters
    ----------
    names:
        Of parts that a gate reads, in the order in which it reads them.

    Raises
    ------
    ConfigError
        They are unknown, not all different, or none.
    """
    names = tuple(names)
    if not names or len(set(names)) != len(names) or not set(names) <= set(FEATURES):
        raise ConfigError(f"gate features {names}: expected one or more of {FEATURES}, each at most once")
    return names


def reads_visual(names: Sequence[str]) -> bool:
    """Do the features need the states of visual tokens?

    Parameters
    ----------
    names:
        Of the parts, as in `GateConfig.features`.
    """
    return any(name.endswith("_visual") for name in names)


def prompt_features(
    hidden_BND: Tensor,
    prompt_mask_BN: Tensor,
    visual_mask_BN: Tensor | None = None,
    names: Sequence[str] = DEFAULT_FEATURES,
) -> Tensor:
    """What a gate reads of the prompt, (B, P D) float32, one part of size D for each name, in their order.

    mean_prompt: mean over the prompt text without its last token; last_prompt: that token. A single prompt
    token is its own mean. mean_visual, last_visual: mean over all visual tokens, the last of them included,
    and the last. A row without the tokens of a part gives zeros there. The one definition of the features,
    in training and inference. Source: DyVTE, Eq. 1 and Table 4.

    Parameters
    ----------
    hidden_BND:
        Output of a decoder layer.
    prompt_mask_BN, visual_mask_BN:
        Prompt text after the image, and visual tokens (``Spans``); the latter where a name asks for it.
    names:
        Which parts, in which order: "mean_prompt", "last_prompt", "mean_visual", "last_visual".
    """
    return FeatureReader(prompt_mask_BN, visual_mask_BN, names)(hidden_BND)


class FeatureReader:
    """`prompt_features` of many layers' outputs: what depends on the masks alone is worked out once.

    Parameters
    ----------
    prompt_mask_BN, visual_mask_BN, names:
        As for `prompt_features`.

    Raises
    ------
    ConfigError
        If a name needs visual tokens and their mask is missing.
    """

    def __init__(
        self,
        prompt_mask_BN: Tensor,
        visual_mask_BN: Tensor | None = None,
        names: Sequence[str] = DEFAULT_FEATURES,
    ) -> None:
        if reads_visual(names) and visual_mask_BN is None:
            raise ConfigError(f"gate features {tuple(names)} need the positions of the visual tokens")
        self._weights_BPN = torch.stack([_weights(name, prompt_mask_BN, visual_mask_BN) for name in names], 1)
        # Where not a token that is read, the weight is 0, but 0 * inf would still be NaN.
        self._unread_BN1 = ~(self._weights_BPN > 0).any(1)[..., None]

    def __call__(self, hidden_BND: Tensor) -> Tensor:
        """(B, P D) float32 features of a layer's output."""
        return torch.bmm(self._weights_BPN, hidden_BND.float().masked_fill(self._unread_BN1, 0.0)).flatten(1)


def select_features(features_F: Tensor, stored: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """The parts named ``wanted`` of features (..., F) that hold the parts ``stored``.

    Parameters
    ----------
    features_F
        (..., F), parts of equal size one after the other.
    stored
        Names of the parts.
    wanted
        Names, in the order they are wanted in.

    Raises
    ------
    ConfigError
        If a wanted part is not stored.
    """
    if tuple(stored) == tuple(wanted):
        return features_F
    if missing := [name for name in wanted if name not in stored]:
        raise ConfigError(
            f"the traces hold the features {', '.join(stored)}, the gates read {', '.join(wanted)}: trace "
            f"again with --features that include {', '.join(missing)}"
        )
    parts_PD = features_F.unflatten(-1, (len(stored), -1))
    return parts_PD[..., [list(stored).index(name) for name in wanted], :].flatten(-2)


def _weights(name: str, prompt_BN: Tensor, visual_BN: Tensor | None) -> Tensor:
    """(B, N) float32 weights of the tokens of one part."""
    where, tokens_BN = name.split("_")[0], prompt_BN if name.endswith("_prompt") else visual_BN
    count_BN = tokens_BN.cumsum(1)
    total_B1 = count_BN[:, -1:]
    if where == "last":
        return (tokens_BN & (count_BN == total_B1)).float()
    if name == "mean_prompt":
        tokens_BN = tokens_BN & ((count_BN < total_B1) | (total_B1 == 1))
    return tokens_BN / tokens_BN.sum(1, keepdim=True).clamp(min=1)

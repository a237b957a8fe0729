"""What a block looks at before it lets a pass begin."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dyvte.backbones import Backbone, fingerprint, weights_digest
from dyvte.decoder import Layout
from dyvte.errors import ExitRuntimeError, GateMismatchError
from dyvte.gates import GateConfig
from dyvte.policies import Policy
from dyvte.reductions import Reduction
from dyvte.runtime.cache import holds_exits
from dyvte.runtime.frozen import check_can_freeze


def check_decode_mask(mask_BN: Tensor | None, cache: Any, total: int) -> None:
    """Raise ExitRuntimeError if a mask does not name every token of a cache that tokens have left."""
    # Stock layers would hide what a short mask does not name; shortened layers could not tell what it means.
    if mask_BN is None or mask_BN.shape[1] == total or not holds_exits(cache):
        return
    raise ExitRuntimeError(
        f"attention_mask has length {mask_BN.shape[1]}, expected {total}: one entry for every token of the "
        "cache (those that left included) and for every new one"
    )


def check_policy(
    policy: Policy, backbone: Backbone, *, allow_transfer: bool = False, advice: str = ""
) -> bool:
    """See that a policy can serve a backbone, and was made for it.

    Of a model without weights all is looked at but the digest of its weights.

    Parameters
    ----------
    policy
        When visual tokens freeze and leave.
    backbone
        The model in hand.
    allow_transfer, advice
        As for `check_fingerprints`.

    Returns
    -------
    bool
        True where it was made for another backbone, and that is allowed.

    Raises
    ------
    GateMismatchError, ConfigError, UnsupportedBackboneError
        It does not fit, or layers that it freezes in cannot be had.
    """
    policy.check(backbone.num_layers, backbone.hidden_size)
    if policy.may_freeze:
        check_can_freeze(backbone)
    config = policy.made_for
    if config is None or not config.backbone:
        return False
    found = {"fingerprint": fingerprint(backbone.model)}
    if config.backbone.get("weights"):
        found["weights"] = weights_digest(backbone.model)
    return check_fingerprints(config, found, allow_transfer, advice)


def check_reductions_of(reductions: Sequence[Reduction], backbone: Backbone) -> None:
    """Raise where a reduction cannot serve a backbone, or was measured on another."""
    for reduction in reductions:
        reduction.check(backbone.num_layers)
        reduction.check_backbone(backbone)
    if any(one.may_freeze for one in reductions):
        check_can_freeze(backbone)


def check_fingerprints(
    config: GateConfig, found: Mapping[str, str | None], allow_transfer: bool, advice: str = ""
) -> bool:
    """True where a backbone's fingerprints are not those of the gates' and that is allowed.

    Parameters
    ----------
    found
        Of the backbone in hand: ``fingerprint`` of its architecture, ``weights`` digest. None: it cannot be
        had, and is not compared.
    advice
        What else can be done, where there is a way to allow it; in the words of whoever is told.

    Raises
    ------
    GateMismatchError
        They differ, and ``allow_transfer`` is False.
    """
    for name, have in found.items():
        want = config.backbone.get(name)
        if not want or have is None or want == have:
            continue
        if allow_transfer:
            return True
        raise GateMismatchError(
            f"these gates were made for {config.backbone.get('id', 'another backbone')} ({name} {want}), "
            f"the model in hand has {name} {have}: use its own gates{advice}"
        )
    return False


def warn_short_prompts(layout: Layout) -> None:
    """Warn of rows with next to no question."""
    short = int((layout.has_image_B & (layout.num_prompt_B == 1)).sum())
    if short:
        warnings.warn(
            f"{short} rows have a single text token after the image: gates see little of the question",
            stacklevel=2,
        )

"""Do policies and reductions fit a backbone? Asked before its weights are read, and again with them.

All that files tell is found at the first asking: shapes, the architecture's fingerprint, layer numbers, the
image padding that gates know. With weights in memory, their digest is compared as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dyvte.backbones import check_image_padding, describe, get_template, image_padding
from dyvte.backbones.load import BeforeWeights
from dyvte.errors import DyvteError
from dyvte.evaluation.settings import NamedPolicy
from dyvte.policies import Policy
from dyvte.reductions import Reduction
from dyvte.runtime.checks import check_policy, check_reductions_of


def check_fit(
    model: nn.Module,
    processor: Any,
    policies: Mapping[str, Policy],
    reductions: Sequence[Reduction] = (),
    *,
    allow_transfer: bool = False,
) -> None:
    """Raise where a policy or a reduction cannot serve a backbone, or was made for another.

    Parameters
    ----------
    model
        With weights, or on the meta device.
    processor
        Its processor.
    policies
        By the setting that names them, for messages.
    reductions
        In force with all of them.
    allow_transfer
        Let gates of another backbone of the same shape pass.

    Raises
    ------
    GateMismatchError
        Made for another backbone, or for images that are padded otherwise.
    ConfigError, UnsupportedBackboneError
        A layer that is not there, or one whose visual tokens cannot be frozen.
    """
    backbone = describe(model)
    for setting, policy in policies.items():
        try:
            check_policy(policy, backbone, allow_transfer=allow_transfer)
        except DyvteError as error:
            raise type(error)(f"{setting}: {error}") from error
        trained = None if policy.made_for is None else policy.made_for.backbone.get("image_padding")
        check_image_padding(trained, image_padding(processor), setting)
    check_reductions_of(reductions, backbone)


def check_named(model: nn.Module, processor: Any, policies: Sequence[NamedPolicy]) -> None:
    """`check_fit` of an evaluation's policies, each with its reductions.

    Parameters
    ----------
    model
        With weights, or on the meta device.
    processor
        Its processor.
    policies
        As they were parsed.
    """
    for named in policies:
        allow = bool(named.options.get("allow_transfer"))
        setting = named.setting or f"policy {named.name}"
        check_fit(model, processor, {setting: named.policy}, named.reductions, allow_transfer=allow)


def before_weights(policies: Sequence[NamedPolicy], template: str) -> BeforeWeights:
    """What `open_backbone` is to look at before it reads weights: these policies, and the prompt template.

    Parameters
    ----------
    policies
        As they were parsed.
    template
        Its name.
    """

    def check(model: nn.Module, processor: Any) -> None:
        get_template(template, processor)
        check_named(model, processor, policies)

    return check

"""What a user says in ``--additional-config '{"dyvte": {...}}'``. Nothing of vLLM is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dyvte.config import from_dict
from dyvte.errors import ConfigError, UnsupportedBackboneError
from dyvte.plugins.vllm.book import RequestBook
from dyvte.plugins.vllm.names import ARCHITECTURES, KEY
from dyvte.policies import FixedPolicy, FreezePolicy, LearnedPolicy, NeverPolicy, Policy, parse_policy
from dyvte.runtime.checks import check_fingerprints

ADVICE = f'set "allow_transfer": true beside "policy" in --additional-config {KEY}'
"""How gates of another backbone are allowed in an engine."""
_SERVED = (NeverPolicy, FixedPolicy, FreezePolicy, LearnedPolicy)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine."""

    policy: str = NeverPolicy.name
    """When visual tokens freeze and leave: never, fixed:K, freeze:F[:K] or gates:FOLDER[@THRESHOLD]."""
    allow_transfer: bool = False
    """Accept gates trained for another backbone of the same shape."""
    text_only_cache: bool = False
    """With a fixed exit: keep no KV memory for visual tokens in the layers behind it. vLLM calls the
    interfaces that this needs (scheduler, KV cache managers) not public."""
    log_requests: bool = True
    """One line of the log for each prompt: its tokens and its layers."""

    def parsed(self) -> Policy:
        """The policy.

        Raises
        ------
        ConfigError
            Malformed, or one that decides by sample ids, which an engine has none of.
        """
        policy = parse_policy(self.policy)
        if not isinstance(policy, _SERVED):
            raise ConfigError(
                f"policy {self.policy} is not served inside vLLM: it decides for samples of a data set; use "
                f" {', '.join(one.usage for one in _SERVED)}"
            )
        return policy


class Options(dict[str, Any]):
    """The user's settings, in their place in vLLM's configuration, with the engine's book of requests.

    The configuration goes, copied or pickled, to the process that runs the model; there it is what the model
    and the book's keeper (`dyvte.plugins.vllm.keeper`) have in common.
    """

    def __init__(self, values: Mapping[str, Any], book: RequestBook) -> None:
        super().__init__(values)
        self.book = book

    @property
    def config(self) -> EngineConfig:
        """The settings, checked."""
        return engine_config(self)


def engine_config(values: Any) -> EngineConfig:
    """Settings from what the user gave.

    Raises
    ------
    ConfigError
        An unknown one (the nearest is named), or a value of another type.
    """
    origin = f"--additional-config {KEY}"
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{origin}: expected an object such as {{'policy': 'freeze:8:24'}}, found {values!r}"
        )
    return from_dict(EngineConfig, dict(values), origin=origin)


def check_made_for(
    policy: Policy, found: Mapping[str, str | None], config: EngineConfig, option: str = ADVICE
) -> None:
    """Hold a policy to the backbone that it was made for, if to any.

    Parameters
    ----------
    found
        Fingerprints of the backbone in hand, as `dyvte.runtime.checks.check_fingerprints` takes them.
    option
        How another backbone's is allowed, in the words of whoever is told.

    Raises
    ------
    GateMismatchError
        It was made for another, and ``allow_transfer`` is not set.
    """
    if policy.made_for is not None:
        check_fingerprints(policy.made_for, found, config.allow_transfer, f", or {option}")


def last_layer(policy: Policy, num_layers: int) -> int:
    """Layers in which text can read visual tokens: of the prompt that keeps them longest."""
    if isinstance(policy, FixedPolicy | FreezePolicy) and policy.exit_layer is not None:
        return policy.exit_layer
    return num_layers


def may_leave(policy: Policy, num_layers: int) -> bool:
    """May visual tokens be gone before the last layer?"""
    return isinstance(policy, LearnedPolicy) or last_layer(policy, num_layers) < num_layers


def options_of(vllm_config: Any) -> Options | None:
    """The engine's options; None where its user gave none, or vLLM's checks have not run yet."""
    extra = vllm_config.additional_config
    found = extra.get(KEY) if isinstance(extra, Mapping) else None
    return found if isinstance(found, Options) else None


def our_architecture(config: Any) -> str:
    """The architecture to name in ``--hf-overrides`` for a transformers config.

    Raises
    ------
    UnsupportedBackboneError
        There is none; those there are are named.
    """
    given = list(getattr(config, "architectures", None) or ())
    by_stock = {stock: ours for ours, stock in ARCHITECTURES.items()}
    for name in given:
        if name in by_stock or name in ARCHITECTURES:
            return by_stock.get(name, name)
    raise UnsupportedBackboneError(
        f"the vLLM plug-in does not serve {', '.join(given) or config.model_type}; it serves "
        f"{', '.join(by_stock)}"
    )

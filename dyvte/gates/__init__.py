"""The gates: what they read, how they are stored, and the one place of the decision rule."""

from .config import GateConfig
from .features import FEATURES, prompt_features
from .files import save_config
from .rule import (
    ExitRule,
    check_rule,
    exit_layers,
    exit_probabilities,
    logit_threshold,
    uniform_offsets,
)
from .stack import GateStack, load_checkpoint

__all__ = [
    "FEATURES",
    "ExitRule",
    "GateConfig",
    "GateStack",
    "check_rule",
    "exit_layers",
    "exit_probabilities",
    "load_checkpoint",
    "logit_threshold",
    "prompt_features",
    "save_config",
    "uniform_offsets",
]

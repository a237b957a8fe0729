"""The gates: what they read, how they are stored, and the one place of the decision rule."""

from dyvte.gates.architectures import ARCHITECTURES
from dyvte.gates.config import GateConfig
from dyvte.gates.features import (
    DEFAULT_FEATURES,
    FEATURES,
    check_features,
    prompt_features,
    reads_visual,
    select_features,
)
from dyvte.gates.files import save_config
from dyvte.gates.rule import (
    CLOSED,
    ExitRule,
    check_rule,
    close_gates,
    exit_layers,
    exit_probabilities,
    logit_threshold,
    uniform_offsets,
)
from dyvte.gates.stack import GateStack, load_checkpoint

__all__ = [
    "ARCHITECTURES",
    "CLOSED",
    "DEFAULT_FEATURES",
    "FEATURES",
    "ExitRule",
    "GateConfig",
    "GateStack",
    "check_features",
    "check_rule",
    "close_gates",
    "exit_layers",
    "exit_probabilities",
    "load_checkpoint",
    "logit_threshold",
    "prompt_features",
    "reads_visual",
    "save_config",
    "select_features",
    "uniform_offsets",
]

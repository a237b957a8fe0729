"""The gates: what they read, how they are stored, and the one place of the decision rule."""

from dyvte.gates.architectures import ARCHITECTURES
from dyvte.gates.config import GateConfig
from dyvte.gates.features import (
    DEFAULT_FEATURES,
    FEATURES,
    FeatureReader,
    check_features,
    prompt_features,
    reads_visual,
    select_features,
)
from dyvte.gates.files import save_config, write_groups
from dyvte.gates.groups import (
    NOT_ASKED,
    UNLIKE,
    FoundGroups,
    GroupFinder,
    GroupRule,
    GroupThresholds,
    thresholds_named,
)
from dyvte.gates.logits import HeadLogits
from dyvte.gates.offsets import (
    CLOSED,
    close_freezes,
    close_gates,
    uniform_freeze_offsets,
    uniform_offsets,
)
from dyvte.gates.probabilities import exit_probabilities, schedule_probabilities
from dyvte.gates.rule import (
    ScheduleRule,
    Schedules,
    check_rule,
    exit_layers,
    follow_threshold,
    logit_threshold,
    schedules,
)
from dyvte.gates.stack import GateStack, load_checkpoint

__all__ = [
    "ARCHITECTURES",
    "CLOSED",
    "DEFAULT_FEATURES",
    "FEATURES",
    "NOT_ASKED",
    "UNLIKE",
    "FeatureReader",
    "FoundGroups",
    "GateConfig",
    "GateStack",
    "GroupFinder",
    "GroupRule",
    "GroupThresholds",
    "HeadLogits",
    "ScheduleRule",
    "Schedules",
    "check_features",
    "check_rule",
    "close_freezes",
    "close_gates",
    "exit_layers",
    "exit_probabilities",
    "follow_threshold",
    "load_checkpoint",
    "logit_threshold",
    "prompt_features",
    "reads_visual",
    "save_config",
    "schedule_probabilities",
    "schedules",
    "select_features",
    "thresholds_named",
    "uniform_freeze_offsets",
    "uniform_offsets",
    "write_groups",
]

"""The papers' analyses on any backbone: ``dyvte analyze``. One module for each study."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from dyvte.analysis.findings import Findings, Table
from dyvte.analysis.subject import AnalysisConfig, Subject, open_subject
from dyvte.errors import ConfigError
from dyvte.registry import unknown

STUDIES: dict[str, tuple[str, str]] = {
    "migration": ("VTW Table 1", "no image, a blank image before K, the real image before K"),
    "controls": ("VTW Table 2", "fixed K beside random K, random tokens removed and FastV"),
    "cost": ("VTW Table 4", "memory and latency"),
    "eta": ("VTW Table 5", "eta -> K -> accuracy"),
    "positions": ("VTW Table 6", "position ids kept or rearranged behind the exit"),
    "last_token": ("VTW Figures 4 and 5", "attention of the last token to the four kinds of tokens"),
    "drift": ("long answers, ours", "KL by position over a forced continuation, first differing token"),
    "layers": ("VTW Figure 8, DyVTE Figure 3", "accuracy and KL over K: the static exit curve"),
    "stages": ("DyVTE, empirical study", "attention between text and image: three stages"),
    "gate_inputs": ("DyVTE Tables 4 and 7", "what gates read: trained from one trace"),
    "exits": ("DyVTE Figure 7", "histograms of exit layers"),
    "transfer": ("DyVTE Table 6", "gates of another model of the same shape"),
    "shift": ("certificates by group, ours", "do these questions look like those calibrated on?"),
    "distance": ("YOPO Figure 2", "attention between visual tokens over their distance"),
    "text_to_vision": ("YOPO Figure 3", "attention of each text token to vision over layers"),
    "head_rho": ("YOPO Figure 5", "rho of each head and layer"),
}
"""Name, which is also the module here: source and one-line help."""


def get_study(name: str) -> Callable[[Subject], Findings]:
    """The function that does a study.

    Parameters
    ----------
    name
        One of `STUDIES`, as `dyvte analyze` takes it.

    Raises
    ------
    ConfigError
        Unknown name; the nearest one is named.
    """
    check_study(name)
    return importlib.import_module(f"dyvte.analysis.{name}").study


def check_study(name: str) -> None:
    """See that a study of this name exists.

    Parameters
    ----------
    name
        As it was given.

    Raises
    ------
    ConfigError
        It does not; the nearest name is shown.
    """
    if name not in STUDIES:
        raise ConfigError(unknown("study", name, STUDIES))


__all__ = [
    "STUDIES",
    "AnalysisConfig",
    "Findings",
    "Subject",
    "Table",
    "check_study",
    "get_study",
    "open_subject",
]

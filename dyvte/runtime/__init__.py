"""Inference with exits: the context manager and what it reports."""

from .records import PrefillRecord, Run
from .visual_exit import VisualExit

__all__ = ["PrefillRecord", "Run", "VisualExit"]

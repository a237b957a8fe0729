"""Inference with exits: the context manager and what it reports."""

from dyvte.runtime.records import PrefillRecord, Run
from dyvte.runtime.visual_exit import VisualExit

__all__ = ["PrefillRecord", "Run", "VisualExit"]

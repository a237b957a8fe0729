"""Inference with exits: the context manager and what it reports."""

from dyvte.runtime.image_store import ImageStore, StoreReport
from dyvte.runtime.records import PrefillRecord, Run
from dyvte.runtime.visual_exit import VisualExit

__all__ = ["ImageStore", "PrefillRecord", "Run", "StoreReport", "VisualExit"]

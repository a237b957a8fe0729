"""Errors a user can meet. Each one also is a ValueError or RuntimeError, so ordinary handlers catch it."""

from __future__ import annotations


class DyvteError(Exception):
    """Base of every error that dyvte raises on purpose; its text says what was wrong and what to do."""


class ConfigError(DyvteError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(DyvteError, ValueError):
    """Input data does not have the form that was asked for."""


class UnsupportedBackboneError(DyvteError, ValueError):
    """The model cannot drop its visual tokens part-way, or its visual tokens cannot be told apart."""


class GateMismatchError(DyvteError, ValueError):
    """Gates were made for another backbone."""


class NoVisualTokensError(DyvteError, ValueError):
    """Images were given, but the prompt holds no visual token."""


class ScoreError(DyvteError, ValueError):
    """Predictions and questions do not fit together."""


class CheckpointError(DyvteError, RuntimeError):
    """A checkpoint is missing, incomplete or not readable."""


class ExitRuntimeError(DyvteError, RuntimeError):
    """The exit runtime was used in a way it cannot serve: a nested block, a foreign cache or mask."""


class MemoryBudgetError(DyvteError, ValueError):
    """A pass cannot be cut up so that it fits the memory it was given."""


class CalibrationError(DyvteError, ValueError):
    """No threshold can meet what calibration was asked for."""


class TrainingError(DyvteError, RuntimeError):
    """Training cannot go on: a loss is not finite, or the outputs cannot be written."""

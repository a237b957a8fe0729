"""What a gate is made of: one architecture per file, registered under its name."""

from dyvte.gates.architectures.base import ARCHITECTURES, Architecture

__all__ = ["ARCHITECTURES", "Architecture"]

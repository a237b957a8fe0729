"""Data: LLaVA instruction files, and the synthetic scenes of the embedded default."""

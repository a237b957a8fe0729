"""Synthetic scenes of the embedded default: a seeded world, its images, its questions, its files."""

"""Synthetic scenes of the embedded default: a seeded world, its pictures, its questions, its files."""

"""Benchmarks: loaders, prompts, scorers; one file each. No torch."""

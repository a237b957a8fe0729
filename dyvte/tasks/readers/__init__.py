"""Files that benchmarks come in."""

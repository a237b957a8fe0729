"""Mini benchmarks on disk, one file for each kind, with the same questions in every format of a benchmark."""

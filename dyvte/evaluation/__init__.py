"""Run a setting (policy and reductions) on a task: generation, run log, scores, latency."""

"""Benchmarks, scores, cost, rivals and comparisons.

:mod:`~dyvte.evaluation.benchmarks` holds one file per benchmark (a loader and a pure scorer);
:mod:`~dyvte.evaluation.runner` asks the questions,
:mod:`~dyvte.evaluation.compare` puts exit policies side by side.
"""

"""HR-Bench at 8K: the same about images twice as large, see :mod:`dyvte.tasks.hrbench4k`."""

from __future__ import annotations

from dyvte.tasks.base import TASKS
from dyvte.tasks.hrbench4k import HRBench4K


@TASKS.register
class HRBench8K(HRBench4K):
    """Images of about 8,000 pixels a side."""

    name = "hrbench8k"
    title = "HR-Bench 8K"
    submission_name = "hrbench8k_answers.json"
    expected_tree = "  <root>/hr_bench_8k.tsv      (or HRBench8K.tsv)\n  or <root>/hr_bench_8k.parquet"
    tables = ("hr_bench_8k.tsv", "HRBench8K.tsv", "*hr*bench*8k*.tsv")
    shards = ("hr_bench_8k*.parquet", "*/hr_bench_8k*.parquet")

"""RefCOCOg: long expressions (Mao et al., 2016), val and test of the UMD split.

See :mod:`dyvte.tasks.grounding` for what is scored, and :mod:`dyvte.tasks.answers.boxes` for whose numbers
mean what.
"""

from __future__ import annotations

from dyvte.tasks.base import TASKS
from dyvte.tasks.grounding import GroundingBenchmark


@TASKS.register
class RefCOCOg(GroundingBenchmark):
    """All splits that are there but train."""

    name = "refcocog"
    title = "RefCOCOg"
    submission_name = "refcocog_answers.json"
    expected_tree = (
        "  <root>/refcocog_test.jsonl                (Qwen-VL's lines: image, sent, bbox, width, height)\n"
        "  or <root>/refs(umd).json, instances.json       (release, the pickle's content as JSON)\n"
        "  with train2014/<image>                     (or images/)\n"
        "  or <root>/data/{val,testA,testB,test}-*.parquet\n"
        "  or <root>/RefCOCO.tsv                      (VLMEvalKit's, with all three data sets)"
    )
    refs = ("refs(umd)*.json", "refs(*)*.json")
    lines = "refcocog_*.jsonl"
    tables = ("RefCOCO.tsv", "*refcocog*.tsv")

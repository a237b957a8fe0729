"""RefCOCO: short expressions for things in photographs (Yu et al., 2016), val, testA and testB.

See :mod:`dyvte.tasks.grounding` for what is scored, and :mod:`dyvte.tasks.answers.boxes` for whose numbers
mean what.
"""

from __future__ import annotations

from dyvte.tasks.base import TASKS
from dyvte.tasks.grounding import GroundingBenchmark


@TASKS.register
class RefCOCO(GroundingBenchmark):
    """All splits that are there but train."""

    name = "refcoco"
    title = "RefCOCO"
    submission_name = "refcoco_answers.json"
    expected_tree = (
        "  <root>/refcoco_testA.jsonl                (Qwen-VL's lines: image, sent, bbox, width, height)\n"
        "  or <root>/refs(unc).json, instances.json       (release, the pickle's content as JSON)\n"
        "  with train2014/<image>                     (or images/)\n"
        "  or <root>/data/{val,testA,testB,test}-*.parquet\n"
        "  or <root>/RefCOCO.tsv                      (VLMEvalKit's, with all three data sets)"
    )
    refs = ("refs(unc)*.json", "refs(*)*.json")
    lines = "refcoco_*.jsonl"
    tables = ("RefCOCO.tsv", "*refcoco*.tsv")

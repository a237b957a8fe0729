"""InfographicVQA: questions about infographics (Mathew et al., 2022), validation; test without score.

Scored by ANLS, see :mod:`dyvte.tasks.answers.anls`; the dialects differ in blanks around an answer only.
"""

from __future__ import annotations

from dyvte.tasks.base import TASKS
from dyvte.tasks.documents import DocumentBenchmark


@TASKS.register
class InfoVQA(DocumentBenchmark):
    """Task 3 of the document questions."""

    name = "infovqa"
    title = "InfographicVQA"
    submission_name = "infovqa_answers.json"
    expected_tree = (
        "  <root>/                                            release of the Robust Reading Competition\n"
        "    infographicsVQA_val_v1.0_withQT.json             (or infographicsVQA_{val,test}_v1.0.json)\n"
        "    infographicsvqa_images/<image>.jpeg              (or images/)\n"
        "  or <root>/InfographicVQA/validation-*.parquet      (or data/)\n"
        "  or <root>/InfoVQA_VAL.tsv"
    )
    release = ("infographicsVQA_val*withQT.json", "infographicsVQA_val*.json", "infographicsVQA_test*.json")
    image_folders = ("infographicsvqa_images", "images")
    image_field = "image_local_name"
    type_fields = ("answer_type", "operation/reasoning")

    tables = ("InfoVQA_VAL.tsv", "*infovqa*.tsv")
    shards = (
        *("InfographicVQA/validation-*.parquet", "data/validation-*.parquet"),
        *("InfographicVQA/*.parquet", "*.parquet"),
    )
    shard_columns = ("answer_type",)

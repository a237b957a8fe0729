"""DocVQA: questions about scanned pages (Mathew et al., 2021), validation; test without score.

Scored by ANLS, see :mod:`dyvte.tasks.answers.anls`; the dialects differ in blanks around an answer only.
"""

from __future__ import annotations

from dyvte.tasks.base import TASKS
from dyvte.tasks.documents import DocumentBenchmark


@TASKS.register
class DocVQA(DocumentBenchmark):
    """Single pages (task 1)."""

    name = "docvqa"
    title = "DocVQA"
    submission_name = "docvqa_answers.json"
    expected_tree = (
        "  <root>/                                     release of the Robust Reading Competition\n"
        "    val_v1.0_withQT.json                      (or val_v1.0.json, test_v1.0.json)\n"
        "    spdocvqa_images/<image>.png               (or documents/, images/)\n"
        "  or <root>/DocVQA/validation-*.parquet       (or data/)\n"
        "  or <root>/DocVQA_VAL.tsv"
    )
    release = ("val_v1.0_withQT.json", "val_v1.0*.json", "test_v1.0*.json")
    image_folders = ("spdocvqa_images", "documents", "images")
    type_fields = ("question_types",)

    tables = ("DocVQA_VAL.tsv", "*docvqa*.tsv")
    shards = ("DocVQA/validation-*.parquet", "data/validation-*.parquet", "DocVQA/*.parquet", "*.parquet")
    shard_columns = ("ucsf_document_id",)

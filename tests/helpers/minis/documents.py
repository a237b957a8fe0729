"""Minis of documents and charts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.benchmark_parts import (
    picture,
    put,
    put_parquet,
    put_tsv,
)

PAGES = (
    ("what is the date ?", ["12 May 1975", "May 12, 1975"], ["handwritten", "form"]),
    ("how much ?", ["$1,250.00"], ["table/list"]),
    ("who signed ?", ["R. Smith", "Smith"], ["form"]),
)


def _docvqa_release(root: Path) -> None:
    data = [
        {"questionId": 49153 + n, "question": q, "answers": a, "question_types": kinds, "docId": 14 + n}
        | {"image": f"documents/page_{n % 2}.png", "ucsf_document_id": f"page{n % 2}"}
        | {"ucsf_document_page_no": "1", "data_split": "val"}
        for n, (q, a, kinds) in enumerate(PAGES)
    ]
    put(root / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": data})
    for n in range(2):
        put(root / "spdocvqa_images" / f"page_{n}.png", picture(n))


def _docvqa_parquet(root: Path) -> None:
    rows = [
        {"questionId": str(49153 + n), "question": q, "answers": a, "question_types": kinds, "docId": 14 + n}
        | {"image": picture(n % 2), "ucsf_document_id": f"page{n % 2}", "ucsf_document_page_no": "1"}
        for n, (q, a, kinds) in enumerate(PAGES)
    ]
    put_parquet(root / "DocVQA" / "validation-00000-of-00001.parquet", rows)


def _docvqa_tsv(root: Path) -> None:
    rows = [
        {"index": 49153 + n, "image": picture(n % 2), "question": q, "answer": str(a)}
        for n, (q, a, _) in enumerate(PAGES)
    ]
    put_tsv(root / "DocVQA_VAL.tsv", rows)


def _infovqa_rows() -> list[dict[str, Any]]:
    return [
        {"questionId": 98313 + n, "question": q, "answers": a, "answer_type": ["single span"]}
        | {"operation/reasoning": ["counting"] if n else [], "image_url": f"https://example.org/{n % 2}.png"}
        for n, (q, a, _) in enumerate(PAGES)
    ]


def _infovqa_release(root: Path) -> None:
    data = [{**row, "image_local_name": f"3717{n % 2}.jpeg"} for n, row in enumerate(_infovqa_rows())]
    put(root / "infographicsVQA_val_v1.0_withQT.json", {"dataset_name": "infographicVQA", "data": data})
    for n in range(2):
        put(root / "infographicsvqa_images" / f"3717{n}.jpeg", picture(n))


def _infovqa_parquet(root: Path) -> None:
    rows = [
        {**row, "questionId": str(row["questionId"]), "image": picture(n % 2)}
        for n, row in enumerate(_infovqa_rows())
    ]
    put_parquet(root / "InfographicVQA" / "validation-00000-of-00001.parquet", rows)


def _infovqa_tsv(root: Path) -> None:
    rows = [
        {"index": row["questionId"], "image": picture(n % 2), "question": row["question"]}
        | {"answer": str(row["answers"])}
        for n, row in enumerate(_infovqa_rows())
    ]
    put_tsv(root / "InfoVQA_VAL.tsv", rows)


CHARTS = (
    ("how many bars ?", "4", "human"),
    ("what is the largest value ?", "12.5%", "human"),
    ("which year is lowest ?", "1999", "augmented"),
)


def _chartqa_release(root: Path) -> None:
    for split in ("human", "augmented"):
        rows = [
            {"imgname": f"{n}.png", "query": q, "label": a}
            for n, (q, a, own) in enumerate(CHARTS)
            if own == split
        ]
        put(root / "test" / f"test_{split}.json", rows)
    for n in range(len(CHARTS)):
        put(root / "test" / "png" / f"{n}.png", picture(n))


def _chartqa_parquet(root: Path) -> None:
    rows = [
        {"type": f"{split}_test", "question": q, "answer": a, "image": picture(n)}
        for n, (q, a, split) in enumerate(CHARTS)
    ]
    put_parquet(root / "data" / "test-00000-of-00001.parquet", rows)


def _chartqa_tsv(root: Path) -> None:
    rows = [
        {"index": n, "image": picture(n), "question": q, "answer": a, "split": f"test_{split}"}
        for n, (q, a, split) in enumerate(CHARTS)
    ]
    put_tsv(root / "ChartQA_TEST.tsv", rows)


FORMULAS = "Handwritten Mathematical Expression Recognition"

WORDS = (
    ("what is written in the image?", ["CENTRE"], "Regular Text Recognition", "IIIT5K"),
    ("what is the total ?", ["12.50", "12,50"], "Key Information Extraction", "SROIE"),
    ("write out the expression in LaTeX.", ["x ^ { 2 } + 1"], FORMULAS, "HME100k"),
)


def _ocrbench_release(root: Path) -> None:
    rows = [
        {"id": n, "dataset_name": own, "type": kind, "question": q, "answers": a if n else a[0]}
        | {"image_path": f"{own}/{n}.jpg"}
        for n, (q, a, kind, own) in enumerate(WORDS)
    ]
    put(root / "OCRBench.json", rows)
    for n, row in enumerate(rows):
        put(root / "OCRBench_Images" / row["image_path"], picture(n))


def _ocrbench_parquet(root: Path) -> None:
    rows = [
        {"dataset": own, "question": q, "question_type": kind, "answer": a, "image": picture(n)}
        for n, (q, a, kind, own) in enumerate(WORDS)
    ]
    put_parquet(root / "data" / "test-00000-of-00001.parquet", rows)


def _ocrbench_tsv(root: Path) -> None:
    rows = [
        {"index": n, "image": picture(n), "question": q, "answer": str(a), "category": kind}
        for n, (q, a, kind, _) in enumerate(WORDS)
    ]
    put_tsv(root / "OCRBench.tsv", rows)


WRITERS: dict[str, dict[str, Callable[[Path], None]]] = {
    "docvqa": {"release": _docvqa_release, "parquet": _docvqa_parquet, "tsv": _docvqa_tsv},
    "infovqa": {"release": _infovqa_release, "parquet": _infovqa_parquet, "tsv": _infovqa_tsv},
    "chartqa": {"release": _chartqa_release, "parquet": _chartqa_parquet, "tsv": _chartqa_tsv},
    "ocrbench": {"release": _ocrbench_release, "parquet": _ocrbench_parquet, "tsv": _ocrbench_tsv},
}

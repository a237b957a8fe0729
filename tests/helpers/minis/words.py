"""Minis whose answers are a few words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.benchmark_parts import (
    HUMANS,
    SHORT,
    lines,
    picture,
    put,
    put_parquet,
    put_tsv,
)

MMVET = (("what is x ?", "-1<AND>-5", ["ocr", "math"]), ("what is it ?", "a dog", ["rec"]))


def _mmvet_release(root: Path) -> None:
    put(
        root / "mm-vet.json",
        {
            f"v1_{n}": {"imagename": f"v1_{n}.png", "question": q, "answer": a, "capability": c}
            for n, (q, a, c) in enumerate(MMVET)
        },
    )
    for n in range(2):
        put(root / "images" / f"v1_{n}.png", picture(n))


def _mmvet_llava(root: Path) -> None:
    rows = [{"question_id": n, "image": f"v1_{n}.png", "text": q} for n, (q, _, _) in enumerate(MMVET)]
    put(root / "llava-mm-vet.jsonl", lines(rows))
    for n in range(2):
        put(root / "images" / f"v1_{n}.png", picture(n))


def _mmvet_parquet(root: Path) -> None:
    rows = [
        {"question_id": f"v1_{n}", "question": q, "answer": a, "capability": ",".join(c), "image": picture(n)}
        for n, (q, a, c) in enumerate(MMVET)
    ]
    put_parquet(root / "data" / "test-00000-of-00001.parquet", rows)


def _mmvet_tsv(root: Path) -> None:
    rows = [
        {"index": n, "question": q, "answer": a, "category": ",".join(c), "image": picture(n)}
        for n, (q, a, c) in enumerate(MMVET)
    ]
    put_tsv(root / "MMVet.tsv", rows)


GQA_ITEMS = (("what color is the circle ?", "red"), ("how many ?", "two"), ("is it red ?", "yes"))


def _gqa_entry(n: int) -> dict[str, Any]:
    return {
        "question": GQA_ITEMS[n][0],
        "imageId": f"n{n}",
        "answer": GQA_ITEMS[n][1],
        "isBalanced": True,
        "groups": {"global": "g", "local": "l"},
        "types": {
            "structural": "verify" if n == 2 else "query",
            "semantic": "attr",
            "detailed": "d",
        },
        "semantic": [{"operation": "select", "argument": "circle", "dependencies": [0]}],
    }


def _gqa_release(root: Path, where: str = ".") -> None:
    entries = {f"00{n}": _gqa_entry(n) for n in range(3)}
    put(root / where / "testdev_balanced_questions.json", entries)
    for n in range(3):
        put(root / where / "images" / f"n{n}.png", picture(n))


def _gqa_llava(root: Path) -> None:
    _gqa_release(root, "data")
    rows = [
        {"question_id": f"00{n}", "image": f"n{n}.jpg", "text": GQA_ITEMS[n][0] + SHORT, "category": "d"}
        for n in (2, 0, 1)
    ]
    put(root / "llava_gqa_testdev_balanced.jsonl", lines(rows))


def _gqa_parquet(root: Path) -> None:
    put_parquet(
        root / "testdev_balanced_instructions" / "testdev-0.parquet",
        [{"id": f"00{n}", **_gqa_entry(n)} for n in range(3)],
    )
    put_parquet(
        root / "testdev_balanced_images" / "testdev-0.parquet",
        [{"id": f"n{n}", "image": picture(n)} for n in range(3)],
    )


def _gqa_tsv(root: Path) -> None:
    put_tsv(
        root / "GQA_TestDev_Balanced.tsv",
        [{"index": n, "image": picture(n), "question": q, "answer": a} for n, (q, a) in enumerate(GQA_ITEMS)],
    )


def _textvqa_release(root: Path) -> None:
    data = [
        {"question_id": 34602 + n, "question": q, "image_id": f"i{n % 2}", "answers": a, "set_name": "val"}
        for n, (q, a) in enumerate(HUMANS)
    ]
    put(root / "TextVQA_0.5.1_val.json", {"data": data})
    for n in range(2):
        put(root / "train_images" / f"i{n}.jpg", picture(n))


def _textvqa_llava(root: Path) -> None:
    _textvqa_release(root)
    rows = [
        {
            "question_id": f"i{n % 2}",
            "image": f"i{n % 2}.jpg",
            "text": f"{q}\nReference OCR token: A, B{SHORT}",
        }
        for n, (q, _) in enumerate(HUMANS)
    ]
    put(root / "llava_textvqa_val_v051_ocr.jsonl", lines(rows))


def _textvqa_parquet(root: Path) -> None:
    rows = [
        {"question_id": 34602 + n, "question": q, "image_id": f"i{n % 2}", "answers": a, "image": picture(n)}
        for n, (q, a) in enumerate(HUMANS)
    ]
    put_parquet(root / "data" / "validation-00000-of-00001.parquet", rows)


def _textvqa_tsv(root: Path) -> None:
    rows = [
        {"index": 34602 + n, "image": picture(n), "question": q, "answer": str(a)}
        for n, (q, a) in enumerate(HUMANS)
    ]
    put_tsv(root / "TextVQA_VAL.tsv", rows)


def _vqa_annotation(n: int) -> dict[str, Any]:
    answers = [
        {"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(HUMANS[n][1])
    ]
    return {
        "question_id": 42000 + n,
        "image_id": 42 + n % 2,
        "question_type": "what",
        "answer_type": "other",
        "multiple_choice_answer": HUMANS[n][1][0],
        "answers": answers,
    }


def _vqav2_release(root: Path) -> None:
    questions = [
        {"question_id": 42000 + n, "image_id": 42 + n % 2, "question": q} for n, (q, _) in enumerate(HUMANS)
    ]
    put(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    put(
        root / "v2_mscoco_val2014_annotations.json",
        {"annotations": [_vqa_annotation(n) for n in range(3)]},
    )
    for n in range(2):
        put(root / "val2014" / f"COCO_val2014_{42 + n:012d}.jpg", picture(n))


def _vqav2_llava(root: Path) -> None:
    rows = [
        {"question_id": 7 + n, "image": f"COCO_test2015_{n:012d}.jpg", "text": q + SHORT, "category": "d"}
        for n, (q, _) in enumerate(HUMANS)
    ]
    put(root / "llava_vqav2_mscoco_test-dev2015.jsonl", lines(rows))
    for n in range(3):
        put(root / "test2015" / f"COCO_test2015_{n:012d}.jpg", picture(n))


def _vqav2_parquet(root: Path) -> None:
    rows = [{"question": q, "image": picture(n % 2), **_vqa_annotation(n)} for n, (q, _) in enumerate(HUMANS)]
    put_parquet(root / "data" / "validation-00000-of-00001.parquet", rows)


WRITERS: dict[str, dict[str, Callable[[Path], None]]] = {
    "gqa": {"release": _gqa_release, "llava": _gqa_llava, "parquet": _gqa_parquet, "tsv": _gqa_tsv},
    "textvqa": {
        "release": _textvqa_release,
        "llava": _textvqa_llava,
        "parquet": _textvqa_parquet,
        "tsv": _textvqa_tsv,
    },
    "vqav2": {"release": _vqav2_release, "llava": _vqav2_llava, "parquet": _vqav2_parquet},
    "mmvet": {
        "release": _mmvet_release,
        "llava": _mmvet_llava,
        "parquet": _mmvet_parquet,
        "tsv": _mmvet_tsv,
    },
}

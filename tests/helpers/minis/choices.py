"""Minis of multiple choice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.benchmark_parts import (
    CHOICES,
    LETTER,
    LETTERS,
    lettered,
    lines,
    picture,
    put,
    put_parquet,
    put_tsv,
    rendered,
    text64,
)


def _scienceqa_release(root: Path) -> None:
    problems = {
        str(10 + n): {
            "question": q,
            "choices": list(options),
            "answer": LETTERS.index(gold),
            "hint": "Look." if n == 0 else "",
            "image": "image.png",
            "subject": "natural science",
        }
        for n, (q, options, gold) in enumerate(CHOICES)
    }
    problems["99"] = {"question": "no image", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None}
    put(root / "problems.json", problems)
    put(root / "pid_splits.json", {"test": list(problems), "train": []})
    for n in range(3):
        put(root / "images" / "test" / str(10 + n) / "image.png", picture(n))


def _scienceqa_llava(root: Path) -> None:
    _scienceqa_release(root)
    rows = [
        {
            "id": str(10 + n),
            "image": f"{10 + n}/image.png",
            "conversations": [{"from": "human", "value": f"<image>\n{rendered(q, o)}{LETTER}"}],
        }
        for n, (q, o, _) in enumerate(CHOICES)
    ]
    put(root / "llava_test_CQM-A.json", rows)


def _scienceqa_parquet(root: Path) -> None:
    rows = [
        {
            "image": picture(n),
            "question": q,
            "choices": list(o),
            "answer": LETTERS.index(gold),
            "hint": "Look." if n == 0 else "",
            "subject": "natural science",
        }
        for n, (q, o, gold) in enumerate(CHOICES)
    ]
    put_parquet(root / "ScienceQA-IMG" / "test-00000-of-00001.parquet", rows)


def _choice_tsv(name: str, **more: Any) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        rows = [
            {"index": n, "image": picture(n), "question": q, **lettered(o), "answer": gold, **more}
            for n, (q, o, gold) in enumerate(CHOICES)
        ]
        put_tsv(root / name, rows)

    return write


def _ai2d_release(root: Path) -> None:
    for n, (q, o, gold) in enumerate(CHOICES):
        entry = {
            "abcLabel": n == 2,
            "answerTexts": list(o),
            "correctAnswer": LETTERS.index(gold),
            "questionId": f"{n}.png-0",
        }
        put(root / "questions" / f"{n}.png.json", {"imageName": f"{n}.png", "questions": {q: entry}})
        put(root / "images" / f"{n}.png", picture(n))
    put(root / "abc_images" / "2.png", picture(2))
    put(root / "ai2d_test_ids.csv", "0\n1\n2\n17\n")


def _ai2d_parquet(root: Path) -> None:
    rows = [
        {"question": q, "options": list(o), "answer": str(LETTERS.index(gold)), "image": picture(n)}
        for n, (q, o, gold) in enumerate(CHOICES)
    ]
    put_parquet(root / "data" / "test-00000-of-00001.parquet", rows)


def _seed_entry(n: int) -> dict[str, Any]:
    q, o, gold = CHOICES[n]
    return {
        "question_id": str(100 + n),
        "question": q,
        "answer": gold,
        "data_id": f"{n}_1",
        "data_type": "image",
        "question_type_id": 1,
        **{f"choice_{k.lower()}": v for k, v in lettered(o).items()},
    }


def _seed_release(root: Path) -> None:
    video = {**_seed_entry(0), "question_id": "v9", "data_type": "video"}
    put(
        root / "SEED-Bench.json",
        {"questions": [_seed_entry(n) for n in range(3)] + [video], "question_type": {"Scene": 1}},
    )
    for n in range(3):
        put(root / "SEED-Bench-image" / f"{n}_1", picture(n))


def _seed_llava(root: Path) -> None:
    _seed_release(root)
    rows = [
        {"question_id": 100 + n, "image": f"SEED-Bench-image/{n}_1", "text": rendered(q, o) + LETTER}
        for n, (q, o, _) in enumerate(CHOICES)
    ]
    put(root / "llava-seed-bench.jsonl", lines(rows))


def _seed_parquet(root: Path) -> None:
    put_parquet(
        root / "data" / "test-00000-of-00001.parquet",
        [{**_seed_entry(n), "image": [picture(n)]} for n in range(3)],
    )


def mmbench_rows(answers: bool = True) -> list[dict[str, Any]]:
    """Three questions, each with all rotations of its options; rotated rows point to the first's image."""
    rows = []
    for n, (q, options, gold) in enumerate(CHOICES):
        for turn in range(4):
            turned = options[turn:] + options[:turn]
            right = LETTERS[turned.index(options[LETTERS.index(gold)])]
            rows.append(
                {
                    "index": n + 1_000_000 * turn,
                    "question": q,
                    "hint": "Look." if n == 0 else "",
                    **lettered(turned),
                    "answer": right if answers else "",
                    "category": "color" if n == 0 else "count",
                    "image": picture(n) if turn == 0 else str(n),
                    "l2-category": "perception",
                    "split": "dev",
                }
            )
    return sorted(rows, key=lambda row: row["index"])


def _mmbench_tsv(root: Path) -> None:
    put_tsv(root / "MMBench_DEV_EN.tsv", mmbench_rows())


def _mmbench_parquet(root: Path) -> None:
    rows = mmbench_rows()
    for row in rows:
        row["image"] = picture(row["index"] % 1_000_000)
        row["L2-category"] = row.pop("l2-category")
    put_parquet(root / "en" / "dev-00000-of-00001.parquet", rows)


def _mmmu_rows() -> list[dict[str, Any]]:
    rows = [
        {
            "id": f"validation_{subject}_{n}",
            "question": f"{q} <image 1>",
            "options": str(list(o)),
            "answer": gold,
            "question_type": "multiple-choice",
            "image_1": picture(n),
            "image_2": None,
        }
        for n, (subject, (q, o, gold)) in enumerate(zip(("Math", "Art_Theory", "Art_Theory"), CHOICES))
    ]
    rows[1]["question"] += " and <image 2>"
    rows[1]["image_2"] = picture(7)
    open_question = {**rows[0], "id": "validation_Math_9", "options": "[]", "answer": "3.50"}
    return [*rows, {**open_question, "question_type": "open"}]


def _mmmu_parquet(root: Path) -> None:
    put_parquet(root / "data" / "validation-00000-of-00001.parquet", _mmmu_rows())


def _mmmu_release(root: Path) -> None:
    rows = _mmmu_rows()
    put_parquet(root / "Art_Theory" / "validation-00000-of-00001.parquet", rows[1:3])
    put_parquet(root / "Math" / "validation-00000-of-00001.parquet", [rows[0], rows[3]])


def _mmmu_tsv(root: Path) -> None:
    rows = []
    for n, row in enumerate(_mmmu_rows()):
        images = [text64(row[key]) for key in ("image_1", "image_2") if row[key]]
        options = lettered(CHOICES[n][1]) if n < 3 else dict.fromkeys("ABCD", "")
        rows.append(
            {
                "index": n,
                "id": row["id"],
                "question": row["question"],
                **options,
                "answer": row["answer"],
                "image": images[0] if len(images) == 1 else str(images),
                "split": "validation",
            }
        )
    rows.append({**rows[0], "index": 50, "id": "dev_Math_1", "split": "dev"})
    put_tsv(root / "MMMU_DEV_VAL.tsv", rows)


WRITERS: dict[str, dict[str, Callable[[Path], None]]] = {
    "scienceqa": {
        "release": _scienceqa_release,
        "llava": _scienceqa_llava,
        "parquet": _scienceqa_parquet,
        "tsv": _choice_tsv("ScienceQA_TEST.tsv", category="natural science"),
    },
    "ai2d": {"release": _ai2d_release, "parquet": _ai2d_parquet, "tsv": _choice_tsv("AI2D_TEST.tsv")},
    "mmbench": {"tsv": _mmbench_tsv, "parquet": _mmbench_parquet},
    "mmmu": {"release": _mmmu_release, "parquet": _mmmu_parquet, "tsv": _mmmu_tsv},
    "seed": {
        "release": _seed_release,
        "llava": _seed_llava,
        "parquet": _seed_parquet,
        "tsv": _choice_tsv("SEEDBench_IMG.tsv", category="Scene"),
    },
}

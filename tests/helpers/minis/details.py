"""Minis of multiple choice that small details decide."""

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
    text64,
)

KINDS = (
    ("coarse perception", "image emotion"),
    ("coarse perception", "image style & quality"),
    ("math", "geometry"),
)

"""Category and finer category of each question of ``CHOICES``."""


def _mmstar_parquet(root: Path) -> None:
    rows = [
        {"index": n, "question": f"{q}\nOptions: " + ", ".join(f"{k}: {v}" for k, v in lettered(o).items())}
        | {"answer": gold, "category": KINDS[n][0], "l2_category": KINDS[n][1], "image": picture(n)}
        | {"meta_info": {"source": "MMBench"}}
        for n, (q, o, gold) in enumerate(CHOICES)
    ]
    put_parquet(root / "mmstar.parquet", rows)


def _mmstar_tsv(root: Path) -> None:
    rows = [
        {"index": n, "image": picture(n), "question": q, **lettered(o), "answer": gold}
        | {"category": KINDS[n][0], "l2_category": KINDS[n][1], "bench": "MMBench"}
        for n, (q, o, gold) in enumerate(CHOICES)
    ]
    put_tsv(root / "MMStar.tsv", rows)


DIRECTLY = "Please answer directly with "

SHORT_ONES = (("how many cars are there?", "3"), ("is the road uphill?", "Downhill"))


def _realworldqa_rows() -> list[dict[str, Any]]:
    letter = f"{DIRECTLY}only the letter of the correct option and nothing else."
    choices = [
        {"question": q + "\n\n" + "\n".join(f"{k}. {v}" for k, v in lettered(o).items()) + f"\n{letter}"}
        | {"answer": gold}
        for q, o, gold in CHOICES
    ]
    word = f"{DIRECTLY}a single word or number."
    return [*choices, *({"question": f"{q} {word}", "answer": gold} for q, gold in SHORT_ONES)]


def _realworldqa_release(root: Path) -> None:
    rows = [{"image": f"{n}.webp", **row} for n, row in enumerate(_realworldqa_rows())]
    put(root / "annotations.json", rows)
    for n in range(len(rows)):
        put(root / "images" / f"{n}.webp", picture(n))


def _realworldqa_parquet(root: Path) -> None:
    rows = [
        {"image": picture(n), "image_path": f"{n}.webp", **row} for n, row in enumerate(_realworldqa_rows())
    ]
    put_parquet(root / "data" / "test-00000-of-00001.parquet", rows)


def _realworldqa_tsv(root: Path) -> None:
    rows = [
        {"index": n, "image": picture(n), "question": q, **lettered(o), "answer": gold}
        for n, (q, o, gold) in enumerate(CHOICES)
    ]
    blank = dict.fromkeys("ABCD", "")
    rows += [
        {"index": n, "image": picture(n), "question": q, **blank, "answer": gold}
        for n, (q, gold) in enumerate(SHORT_ONES, start=3)
    ]
    put_tsv(root / "RealWorldQA.tsv", rows)


def _mmvp_rows() -> list[dict[str, Any]]:
    asked = [q for q in ("Is the door open?", "Which way does it face?", "How many?") for _ in range(2)]
    options = (("Open", "Closed"), ("Left (of us)", "Right"), ("One", "Two"))
    return [
        {"Index": n + 1, "Question": q, "Options": "(a) {} (b) {}".format(*options[n // 2])}
        | {"Correct Answer": ("(a)", "(b)")[(n + n // 2) % 2]}
        for n, q in enumerate(asked)
    ]


def _mmvp_release(root: Path) -> None:
    rows = _mmvp_rows()
    lines = [",".join(rows[0]), *(",".join(f'"{cell}"' for cell in row.values()) for row in rows)]
    put(root / "Questions.csv", "\r\n".join(lines) + "\r\n")
    for n in range(len(rows)):
        put(root / "MMVP Images" / f"{n + 1}.jpg", picture(n))


def _mmvp_parquet(root: Path) -> None:
    rows = [{**row, "image": picture(n)} for n, row in enumerate(_mmvp_rows())]
    put_parquet(root / "data" / "train-00000-of-00001.parquet", rows)


def _mmvp_tsv(root: Path) -> None:
    rows = []
    for n, row in enumerate(_mmvp_rows()):
        first, second = row["Options"].removeprefix("(a) ").split(" (b) ")
        gold = row["Correct Answer"][1].upper()
        rows.append({"index": n + 1, "image": picture(n), "question": row["Question"], "A": first})
        rows[-1] |= {"B": second, "answer": gold}
    put_tsv(root / "MMVP.tsv", rows)


PARTS = ("direct_attributes", "relative_position", "direct_attributes")


def _vstar_rows() -> list[dict[str, Any]]:
    return [
        {"text": "\n".join([q, *(f"({k}) {v}" for k, v in lettered(o).items())]) + LETTER}
        | {"category": PARTS[n], "label": gold, "question_id": n}
        for n, (q, o, gold) in enumerate(CHOICES)
    ]


def _vstar_release(root: Path) -> None:
    rows = [{"image": f"{row['category']}/sa_{n}.jpg", **row} for n, row in enumerate(_vstar_rows())]
    put(root / "test_questions.jsonl", lines(rows))
    for n, row in enumerate(rows):
        put(root / row["image"], picture(n))


def _vstar_parquet(root: Path) -> None:
    rows = [{"image": picture(n), **row} for n, row in enumerate(_vstar_rows())]
    put_parquet(root / "data" / "test-00000-of-00001.parquet", rows)


def _vstar_tsv(root: Path) -> None:
    rows = [
        {"index": n, "image": picture(n), "question": q, **lettered(o), "answer": gold, "category": PARTS[n]}
        for n, (q, o, gold) in enumerate(CHOICES)
    ]
    put_tsv(root / "VStarBench.tsv", rows)


def _hrbench_rows() -> list[dict[str, Any]]:
    """Three questions in four orders of their options."""
    rows = []
    for n, (q, o, gold) in enumerate(CHOICES):
        for cycle in range(4):
            turned = o[cycle:] + o[:cycle]
            right = LETTERS[turned.index(o[LETTERS.index(gold)])]
            row = {"index": len(rows), "question": q, "answer": right, **lettered(turned)}
            rows.append({**row, "category": ("single", "cross")[n % 2], "cycle_category": str(cycle)})
    return rows


def _hrbench(size: str) -> dict[str, Callable[[Path], None]]:
    def tsv(root: Path) -> None:
        rows = [{**row, "image": picture(n // 4)} for n, row in enumerate(_hrbench_rows())]
        put_tsv(root / f"hr_bench_{size}.tsv", rows)

    def parquet(root: Path) -> None:
        """As the hub has it: images as base64 text."""
        rows = [{**row, "image": text64(picture(n // 4))} for n, row in enumerate(_hrbench_rows())]
        put_parquet(root / f"hr_bench_{size}.parquet", rows)

    return {"tsv": tsv, "parquet": parquet}


WRITERS: dict[str, dict[str, Callable[[Path], None]]] = {
    "mmstar": {"parquet": _mmstar_parquet, "tsv": _mmstar_tsv},
    "realworldqa": {
        "release": _realworldqa_release,
        "parquet": _realworldqa_parquet,
        "tsv": _realworldqa_tsv,
    },
    "mmvp": {"release": _mmvp_release, "parquet": _mmvp_parquet, "tsv": _mmvp_tsv},
    "vstar": {"release": _vstar_release, "parquet": _vstar_parquet, "tsv": _vstar_tsv},
    "hrbench4k": _hrbench("4k"),
    "hrbench8k": _hrbench("8k"),
}

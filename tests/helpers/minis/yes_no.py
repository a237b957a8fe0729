"""Minis of yes and no."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.benchmark_parts import (
    SHORT,
    YES_NO,
    lines,
    picture,
    put,
    put_parquet,
    put_tsv,
)


def _pope_release(root: Path) -> None:
    for category in ("random", "adversarial"):
        rows = [
            {"question_id": n, "image": f"COCO_val2014_{n // 2}.jpg", "text": text, "label": label}
            for n, (text, label) in enumerate(YES_NO)
        ]
        put(root / "coco" / f"coco_pope_{category}.json", lines(rows))
    for n in range(2):
        put(root / "val2014" / f"COCO_val2014_{n}.jpg", picture(n))


def _pope_llava(root: Path) -> None:
    _pope_release(root)
    rows = [
        {
            "question_id": 4 * c + n,
            "image": f"COCO_val2014_{n // 2}.jpg",
            "text": YES_NO[n][0] + SHORT,
            "category": category,
        }
        for c, category in enumerate(("random", "adversarial"))
        for n in range(4)
    ]
    put(root / "llava_pope_test.jsonl", lines(rows))


def _pope_rows(categories: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"question": text, "answer": label, "image": picture(n // 2), "category": category}
        for category in categories
        for n, (text, label) in enumerate(YES_NO)
    ]


def _pope_parquet(root: Path) -> None:
    rows = _pope_rows(("random", "adversarial"))
    put_parquet(
        root / "data" / "test-00000-of-00001.parquet",
        [{"question_id": str(n % 4), "image_source": f"i{n % 4 // 2}", **r} for n, r in enumerate(rows)],
    )


def _pope_tsv(root: Path) -> None:
    rows = _pope_rows(("random,adversarial",))
    put_tsv(
        root / "POPE.tsv",
        [{"index": n, **row, "answer": row["answer"].capitalize()} for n, row in enumerate(rows)],
    )


MME_PAIRS = (
    ("color", "Is the circle red?", "Is it blue?"),
    ("code_reasoning", "Is it 3?", "Is it 4?"),
    ("artwork", "Is this by Monet?", "Is this by Klee?"),
)

MME_SPLIT = ("artwork",)

"""Subtasks whose images and questions lie in folders of their own, in the release."""

ASK = " Please answer yes or no."


def _mme_release(root: Path) -> None:
    for subtask, first, second in MME_PAIRS:
        images, texts = ("images", "questions_answers_YN") if subtask in MME_SPLIT else (".", ".")
        for n in range(2):
            put(root / subtask / images / f"{n}.png", picture(n))
            put(root / subtask / texts / f"{n}.txt", f"{first}{ASK}\tYes\n{second} {ASK}\tNo")


def _mme_llava(root: Path) -> None:
    _mme_release(root / "MME_Benchmark_release_version")
    rows = [
        {"question_id": image, "image": image, "text": text + SHORT}
        for subtask, *texts in MME_PAIRS
        for n in range(2)
        for image in (f"{subtask}/{'images/' if subtask in MME_SPLIT else ''}{n}.png",)
        for text in texts
    ]
    put(root / "llava_mme.jsonl", lines(rows))


def _mme_rows() -> list[dict[str, Any]]:
    return [
        {"question": text + ASK, "answer": gold, "category": subtask, "image": picture(n), "n": n}
        for subtask, *texts in MME_PAIRS
        for n in range(2)
        for text, gold in zip(texts, ("Yes", "No"))
    ]


def _mme_parquet(root: Path) -> None:
    rows = [{"question_id": f"{r['category']}/{r.pop('n')}.png", **r} for r in _mme_rows()]
    put_parquet(root / "data" / "test-00000-of-00001.parquet", rows)


def _mme_tsv(root: Path) -> None:
    rows = [
        {"index": i, "image_path": f"{r['category']}/{r.pop('n')}.png", **r}
        for i, r in enumerate(_mme_rows())
    ]
    put_tsv(root / "MME.tsv", rows)


def hallusion_rows() -> list[dict[str, Any]]:
    """One set of two figures and two questions, one of one figure, and a question without a figure."""
    ids = [
        *(("VD", "illusion", "0", figure, question) for figure in "01" for question in "01"),
        ("VS", "chart", "0", "1", "0"),
        ("VS", "chart", "0", "0", "0"),
    ]
    return [
        {"category": c, "subcategory": s, "visual_input": "0" if n == 5 else "1", "set_id": own}
        | {"figure_id": f, "question_id": q, "question": f"Is it {q}, {c} {f}?", "gt_answer": str(n % 2)}
        | {"gt_answer_details": "It is.", "filename": None if n == 5 else f"./{c}/{s}/{own}_{f}.png"}
        for n, (c, s, own, f, q) in enumerate(ids)
    ]


def _hallusion_release(root: Path) -> None:
    put(root / "HallusionBench.json", hallusion_rows())
    for n, row in enumerate(hallusion_rows()[:5]):
        name = f"{row['set_id']}_{row['figure_id']}.png"
        put(root / "hallusion_bench" / row["category"] / row["subcategory"] / name, picture(n // 2))


def _hallusion_parquet(root: Path) -> None:
    rows = [{**row, "image": picture(n // 2)} for n, row in enumerate(hallusion_rows()[:5])]
    put_parquet(root / "data" / "image-00000-of-00001.parquet", rows)
    other = [{**row, "image": None} for row in hallusion_rows()[5:]]
    put_parquet(root / "data" / "non_image-00000-of-00001.parquet", other)


def _hallusion_tsv(root: Path) -> None:
    names = ("set_id", "figure_id", "question_id")
    rows = [
        {"index": "_".join(("d", row["category"], row["subcategory"], *(row[name] for name in names)))}
        | {"image": picture(n // 2), "question": row["question"], "category": row["category"]}
        | {"l2-category": row["subcategory"], "answer": ("No", "Yes")[int(row["gt_answer"])]}
        for n, row in enumerate(hallusion_rows()[:5])
    ]
    put_tsv(root / "HallusionBench.tsv", rows)


WRITERS: dict[str, dict[str, Callable[[Path], None]]] = {
    "mme": {"release": _mme_release, "llava": _mme_llava, "parquet": _mme_parquet, "tsv": _mme_tsv},
    "pope": {"release": _pope_release, "llava": _pope_llava, "parquet": _pope_parquet, "tsv": _pope_tsv},
    "hallusionbench": {
        "release": _hallusion_release,
        "parquet": _hallusion_parquet,
        "tsv": _hallusion_tsv,
    },
}

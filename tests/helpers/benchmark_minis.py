"""Minis of benchmarks on which reductions of visual tokens break: documents, boxes, pairs, clips."""

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

# --- documents and charts -------------------------------------------------------------------------------

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


# --- choices --------------------------------------------------------------------------------------------

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


MORE_WRITERS: dict[str, dict[str, Callable[[Path], None]]] = {
    "docvqa": {"release": _docvqa_release, "parquet": _docvqa_parquet, "tsv": _docvqa_tsv},
    "infovqa": {"release": _infovqa_release, "parquet": _infovqa_parquet, "tsv": _infovqa_tsv},
    "chartqa": {"release": _chartqa_release, "parquet": _chartqa_parquet, "tsv": _chartqa_tsv},
    "ocrbench": {"release": _ocrbench_release, "parquet": _ocrbench_parquet, "tsv": _ocrbench_tsv},
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
    "hallusionbench": {
        "release": _hallusion_release,
        "parquet": _hallusion_parquet,
        "tsv": _hallusion_tsv,
    },
}

"""Minis of benchmarks on which reductions of visual tokens break: documents, boxes, pairs, clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tests.helpers.benchmark_parts import (
    CHOICES,
    LETTER,
    LETTERS,
    SIZE,
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


# --- boxes ----------------------------------------------------------------------------------------------

THINGS = (
    ("the dog on the left", (1, 2, 9, 12), "val"),
    ("a dog", (1, 2, 9, 12), "val"),
    ("red cup", (0, 0, 4, 4), "testA"),
    ("the last one", (8, 8, 16, 15), "testA"),
)
"""Expression, corners in pixels of images of ``SIZE`` by ``SIZE``, split."""
_BOX = "Please provide the bounding box coordinate of the region this sentence describes: "


def coco(n: int) -> str:
    return f"COCO_train2014_{n:012d}.jpg"


def _grounding(title: str, refs: str) -> dict[str, Callable[[Path], None]]:
    def jsonl(root: Path) -> None:
        """As Qwen-VL converts it: image paths of another machine."""
        for split in ("val", "testA"):
            rows = [
                {"image": f"data/coco/train2014/{coco(n // 2)}", "sent": sent, "bbox": list(box)}
                | {"height": SIZE, "width": SIZE}
                for n, (sent, box, own) in enumerate(THINGS)
                if own == split
            ]
            put(root / f"{title.lower()}_{split}.jsonl", lines(rows))
        for n in range(2):
            put(root / "train2014" / coco(n), picture(n))

    def release(root: Path) -> None:
        """The content of the pickle, as JSON."""
        rows, boxes = [], []
        for n, (sent, (x1, y1, x2, y2), split) in enumerate(THINGS):
            rows.append({"ref_id": n, "ann_id": n, "image_id": n // 2, "split": split, "file_name": "x"})
            rows[-1] |= {"sentences": [{"sent": sent, "sent_id": 10 + n, "raw": sent.upper()}]}
            boxes.append({"id": n, "image_id": n // 2, "bbox": [x1, y1, x2 - x1, y2 - y1]})
        train = {**rows[0], "split": "train", "sentences": [{"sent": "taught", "sent_id": 99}]}
        shown = [{"id": n, "file_name": coco(n), "width": SIZE, "height": SIZE} for n in range(2)]
        put(root / f"refs({refs}).json", [*rows, train])
        put(root / "instances.json", {"images": shown, "annotations": boxes})
        for n in range(2):
            put(root / "train2014" / coco(n), picture(n))

    def parquet(root: Path) -> None:
        """One row for each thing, with all its expressions."""
        for split, things in (("val", THINGS[:2]), ("testA", THINGS[2:])):
            rows: dict[tuple[int, ...], dict[str, Any]] = {}
            for sent, (x1, y1, x2, y2), _ in things:
                n = 0 if split == "val" else 1
                row = {"question_id": f"{split}{x1}", "image": picture(n), "answer": []}
                row |= {"bbox": [float(v) for v in (x1, y1, x2 - x1, y2 - y1)], "question": "?"}
                row |= {"file_name": coco(n).replace(".jpg", f"_{x1}.jpg"), "iscrowd": 0}
                rows.setdefault((x1, y1), row)["answer"].append(sent)
            put_parquet(root / "data" / f"{split}-00000-of-00001.parquet", [*rows.values()])

    def tsv(root: Path) -> None:
        """VLMEvalKit's one table of all three data sets."""
        rows = [
            {"index": 2 * n + (own != title), "image": picture(n // 2), "question": f"{_BOX}{sent}"}
            | {"answer": str([v / SIZE for v in box]), "category": f"{own} {split}"}
            | {"width": SIZE, "height": SIZE}
            for n, (sent, box, split) in enumerate(THINGS)
            for own in (title, "RefCOCOx")
        ]
        put_tsv(root / "RefCOCO.tsv", rows)

    return {"jsonl": jsonl, "release": release, "parquet": parquet, "tsv": tsv}


# --- captions and clips ---------------------------------------------------------------------------------

SYNONYMS = """person, girl, boy, man, woman, people, player
dog, puppy, hound
hot dog
cell phone, mobile phone, phone
bus, minibus
chair, seat, stool
toilet, urinal
wine glass
cup
"""
SCENES = (
    ("two dogs and a man", ("dog", "person"), "A puppy beside people on a stool."),
    ("a phone", ("cell phone",), "A mobile phone."),
    ("nothing", (), "An empty street."),
)
"""What is there, COCO's categories that are marked, a human caption."""


def _chair_coco(root: Path) -> None:
    names = [line.split(",")[0] for line in SYNONYMS.splitlines()]
    shown = [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in range(len(SCENES))]
    marked = [(n, names.index(kind)) for n, (_, kinds, _) in enumerate(SCENES) for kind in kinds]
    instances = [
        {"id": i, "image_id": n, "category_id": kind, "segmentation": [[0.0] * 6], "area": 1.0}
        for i, (n, kind) in enumerate(marked)
    ]
    kinds = [{"id": i, "name": name, "supercategory": "x"} for i, name in enumerate(names)]
    captions = [{"id": n, "image_id": n, "caption": text} for n, (_, _, text) in enumerate(SCENES)]
    put(root / "annotations" / "captions_val2014.json", {"images": shown, "annotations": captions})
    put(
        root / "annotations" / "instances_val2014.json",
        {"images": shown, "annotations": instances, "categories": kinds},
    )
    put(root / "synonyms.txt", SYNONYMS)
    for n, row in enumerate(shown):
        put(root / "val2014" / row["file_name"], picture(n))


def _chair_parquet(root: Path) -> None:
    held = (["chair", "dog", "person"], ["cell phone"], [])
    rows = [
        {"question_id": str(n), "image": picture(n), "gt_object": list(own)} for n, own in enumerate(held)
    ]
    put_parquet(root / "data" / "test-00000-of-00001.parquet", rows)
    put(root / "synonyms.txt", SYNONYMS)


CLIPS = (
    ("moving_count", "how many objects move ?", ("1", "2", "3"), "2"),
    ("action_sequence", "what came next ?", ("Put it down.", "Took it."), "Took it."),
    ("action_sequence", "and then ?", ("Ate.", "Slept."), "Ate."),
)


def _mvbench_videos(root: Path) -> None:
    put_gif(root / "video" / "clevrer" / "video_validation" / "video_0.gif")
    put_frames(root / "video" / "star" / "Charades_v1_480" / "clip1")


def put_frames(folder: Path, count: int = 12) -> None:
    """Frames 1.png .. count.png, to be ordered by number and not by text."""
    for n in range(1, count + 1):
        put(folder / f"{n}.png", picture(n))


def put_gif(path: Path, count: int = 5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [Image.new("RGB", (SIZE, SIZE), (50 * n, 255 - 50 * n, 40)) for n in range(count)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def _mvbench_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"question": q, "candidates": list(options), "answer": gold, "kind": kind, "video": "video_0.mp4"}
        for kind, q, options, gold in CLIPS
    ]
    for row in rows[1:]:
        row |= {"video": "clip1.mp4", "start": 1.0, "end": 3.0}
    return rows


def _mvbench_release(root: Path) -> None:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in _mvbench_rows():
        by_kind.setdefault(row.pop("kind"), []).append(row)
    for kind, rows in by_kind.items():
        put(root / "json" / f"{kind}.json", rows)
    _mvbench_videos(root)


def _mvbench_tsv(root: Path) -> None:
    rows = []
    for n, row in enumerate(_mvbench_rows()):
        kind = row.pop("kind")
        folder = "star/Charades_v1_480/" if "start" in row else "clevrer/video_validation/"
        row = {"index": n, "task_type": kind.replace("_", " ").title(), "prefix": f"video/{folder}"} | row
        rows.append({**row, "candidates": str(row["candidates"]), "bound": "start" in row})
        rows[-1] |= {"start": row.get("start", ""), "end": row.get("end", "")}
    put_tsv(root / "MVBench.tsv", rows)
    _mvbench_videos(root)


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
    "refcoco": _grounding("RefCOCO", "unc"),
    "refcocoplus": _grounding("RefCOCO+", "unc"),
    "refcocog": _grounding("RefCOCOg", "umd"),
    "chair": {"coco": _chair_coco, "parquet": _chair_parquet},
    "mvbench": {"release": _mvbench_release, "tsv": _mvbench_tsv},
    "hallusionbench": {
        "release": _hallusion_release,
        "parquet": _hallusion_parquet,
        "tsv": _hallusion_tsv,
    },
}

"""Minis of videos, and of captions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tests.helpers.benchmark_parts import (
    CHOICES,
    SIZE,
    lettered,
    picture,
    put,
    put_parquet,
    put_tsv,
)


def _videomme_rows() -> list[dict[str, Any]]:
    return [
        {
            "video_id": f"00{n // 2}",
            "duration": ("short", "long")[n // 2],
            "domain": "Knowledge",
            "sub_category": "Geography",
            "videoID": f"yt_{n // 2}",
            "question_id": f"00{n // 2}-{n}",
            "task_type": "Counting Problem",
            "question": q,
            "options": [f"{k}. {v}" for k, v in lettered(o).items()],
            "answer": gold,
        }
        for n, (q, o, gold) in enumerate(CHOICES)
    ]


def _videomme_frames(root: Path) -> None:
    for n in range(2):
        put_frames(root / "frames" / f"yt_{n}")


def _videomme_parquet(root: Path) -> None:
    put_parquet(root / "videomme" / "test-00000-of-00001.parquet", _videomme_rows())
    _videomme_frames(root)


def _videomme_tsv(root: Path) -> None:
    rows = [
        {**row, "index": n, "candidates": str(row.pop("options")), "video": row.pop("videoID")}
        for n, row in enumerate(_videomme_rows())
    ]
    put_tsv(root / "Video-MME.tsv", rows)
    _videomme_frames(root)


def _videomme_template(root: Path) -> None:
    videos: dict[str, dict[str, Any]] = {}
    for row in _videomme_rows():
        video = {k: row.pop(k) for k in ("video_id", "duration", "domain", "sub_category")}
        video["url"] = f"https://example.org/watch?v={row.pop('videoID')}"
        videos.setdefault(video["video_id"], {**video, "questions": []})["questions"].append(
            {**row, "response": ""}
        )
    put(root / "output_test_template.json", list(videos.values()))
    _videomme_frames(root)


TGIF = (("what is the color of the hat ?", "red", 2), ("how many men dance ?", "two", 1))


def _tgifqa_zero_shot(root: Path) -> None:
    questions = [
        {"video_name": f"tumblr_{n}", "question": q, "question_id": f"FRAMEQA{n}"}
        for n, (q, _, _) in enumerate(TGIF)
    ]
    answers = [{"answer": a, "type": t, "question_id": f"FRAMEQA{n}"} for n, (_, a, t) in enumerate(TGIF)]
    put(root / "test_q.json", questions)
    put(root / "test_a.json", answers[::-1])
    put_gif(root / "mp4" / "tumblr_0.gif")
    put_frames(root / "frames" / "tumblr_1")


def _tgifqa_release(root: Path) -> None:
    rows = [
        {"gif_name": f"tumblr_{n}", "question": q, "answer": a, "type": t, "vid_id": f"FRAMEQA{n}", "key": 5}
        for n, (q, a, t) in enumerate(TGIF)
    ]
    put_tsv(root / "Test_frameqa_question.csv", rows)
    for n in range(2):
        put_gif(root / "gifs" / f"tumblr_{n}.gif")


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


WRITERS: dict[str, dict[str, Callable[[Path], None]]] = {
    "videomme": {"parquet": _videomme_parquet, "tsv": _videomme_tsv, "template": _videomme_template},
    "tgifqa": {"zero_shot": _tgifqa_zero_shot, "release": _tgifqa_release},
    "chair": {"coco": _chair_coco, "parquet": _chair_parquet},
    "mvbench": {"release": _mvbench_release, "tsv": _mvbench_tsv},
}

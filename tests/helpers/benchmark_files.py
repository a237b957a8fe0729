"""Mini benchmarks on disk, in every format that the loaders read, with the same questions in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.benchmark_minis import MORE_WRITERS, put_frames, put_gif
from tests.helpers.benchmark_parts import (
    CHOICES,
    HUMANS,
    LETTER,
    LETTERS,
    SHORT,
    SIZE,
    YES_NO,
    lettered,
    lines,
    picture,
    put,
    put_parquet,
    put_tsv,
    rendered,
    text64,
)

__all__ = [
    "ASK",
    "CASES",
    "CHOICES",
    "HUMANS",
    "LETTER",
    "LETTERS",
    "MME_PAIRS",
    "MME_SPLIT",
    "SHORT",
    "SIZE",
    "WRITERS",
    "YES_NO",
    "lettered",
    "lines",
    "picture",
    "put",
    "put_frames",
    "put_gif",
    "put_parquet",
    "put_tsv",
    "rendered",
    "text64",
    "write_benchmark",
]

# --- yes/no ---------------------------------------------------------------------------------------------


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


# --- short answers --------------------------------------------------------------------------------------

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


# --- multiple choice ------------------------------------------------------------------------------------


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


# --- graded elsewhere -----------------------------------------------------------------------------------

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


# --- videos ---------------------------------------------------------------------------------------------


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


WRITERS: dict[str, dict[str, Callable[[Path], None]]] = {
    "gqa": {"release": _gqa_release, "llava": _gqa_llava, "parquet": _gqa_parquet, "tsv": _gqa_tsv},
    "mme": {"release": _mme_release, "llava": _mme_llava, "parquet": _mme_parquet, "tsv": _mme_tsv},
    "pope": {"release": _pope_release, "llava": _pope_llava, "parquet": _pope_parquet, "tsv": _pope_tsv},
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
    "videomme": {"parquet": _videomme_parquet, "tsv": _videomme_tsv, "template": _videomme_template},
    "tgifqa": {"zero_shot": _tgifqa_zero_shot, "release": _tgifqa_release},
    **MORE_WRITERS,
}
CASES = [(name, form) for name, forms in WRITERS.items() for form in forms]


def write_benchmark(root: Path, name: str, form: str) -> Path:
    """Write a mini benchmark and return where it is."""
    root.mkdir(parents=True, exist_ok=True)
    WRITERS[name][form](root)
    return root

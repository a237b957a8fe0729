"""Scenes written in the formats people have: LLaVA instruction json, GQA's layout, MME's folders.

<root>/instruct/{train,calibration,validation,test}.json + instruct/images/<split>/*.png
<root>/mini_gqa/testdev_balanced_questions.json + mini_gqa/images/*.png
<root>/mini_mme/<subtask>/...        (flat or split layout, as the release has it)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dyvte.data.scenes.questions import TYPES, Question, View, ask, ask_many
from dyvte.data.scenes.render import render
from dyvte.data.scenes.world import Scene, draw_scene

QUESTIONS_PER_SCENE = 8
# Instruction data asks both ways alike, so that gates meet enough yes/no forms of every type.
INSTRUCT_VERIFY_SHARE = 0.5
FORMAT = 2  # raised whenever the same seed gives other files
# Scenes of every file set start far from each other and from those that trained the backbone.
FIRST_SCENE = {"instruct": 20_000_000, "gqa": 30_000_000, "mme": 40_000_000}
# MME subtask -> question type; `scene` is kept in the release's split layout, the others are flat.
MME_SUBTASKS = {
    "existence": "existence",
    "count": "count",
    "position": "relation",
    "color": "color",
    "scene": "background",
    "OCR": "read",
    "numerical_calculation": "sum",
}
MME_SPLIT_LAYOUT = ("scene",)
MME_SUFFIX = " Please answer yes or no."


def _save(scene: Scene, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(scene)).save(path)


def _scenes(split: str, purpose: str, count: int, seed: int) -> Iterator[tuple[Scene, np.random.Generator]]:
    first = FIRST_SCENE[purpose]
    for index in range(first, first + count):
        yield draw_scene(split, index, seed), np.random.default_rng([seed, 101, index])


def write_instruct(root: Path, split: str, samples: int, seed: int = 0) -> Path:
    """LLaVA instruction data: one single-turn conversation per question, 8 questions per scene."""
    folder, records = root / "instruct", []
    count = -(-samples // QUESTIONS_PER_SCENE)
    for number, (scene, rng) in enumerate(_scenes(split, "instruct", count, seed)):
        name = f"{split}/{split}_{number:06d}.png"
        _save(scene, folder / "images" / name)
        for i, q in enumerate(ask_many(scene, rng, QUESTIONS_PER_SCENE, INSTRUCT_VERIFY_SHARE)):
            turns = [
                {"from": "human", "value": f"<image>\n{q.text}"},
                {"from": "gpt", "value": q.answer},
            ]
            ident = f"{split}_{number:06d}_{i:02d}"
            records.append({"id": ident, "image": name, "type": q.type, "conversations": turns})
    path = folder / f"{split}.json"
    path.write_text(json.dumps(records[:samples], indent=0), encoding="utf-8")
    return path


def _gqa_record(q: Question, image_id: str) -> dict:
    semantic = [
        {"operation": op, "dependencies": [i - 1] if i else [], "argument": argument}
        for i, (op, argument) in enumerate(q.program)
    ]
    return {
        "semantic": semantic,
        "entailed": [],
        "equivalent": [],
        "question": q.text,
        "imageId": image_id,
        "isBalanced": True,
        "groups": {"global": None, "local": None},
        "answer": q.answer,
        "semanticStr": "->".join(f"{op}: {argument}" for op, argument in q.program),
        "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
        "types": {"detailed": q.type, "semantic": q.semantic, "structural": q.structural},
        "fullAnswer": q.answer,
    }


def write_gqa(root: Path, questions: int, seed: int = 0, split: str = "test") -> Path:
    """A mini-GQA: GQA's own questions file and images folder, question types as even as scenes allow."""
    folder, records = root / "mini_gqa", {}
    count = -(-questions // QUESTIONS_PER_SCENE)
    for number, (scene, rng) in enumerate(_scenes(split, "gqa", count, seed)):
        image_id = f"s{number:06d}"
        _save(scene, folder / "images" / f"{image_id}.png")
        for i, q in enumerate(ask_many(scene, rng, QUESTIONS_PER_SCENE)):
            records[f"{number:06d}{i:02d}"] = _gqa_record(q, image_id)
    kept = dict(list(records.items())[:questions])
    path = folder / "testdev_balanced_questions.json"
    path.write_text(json.dumps(kept, indent=0), encoding="utf-8")
    return path


def _yes_no_pair(view: View, kind: str, rng: np.random.Generator) -> list[Question] | None:
    """One question of `kind` whose answer is yes and one whose answer is no."""
    found: dict[str, Question] = {}
    for _ in range(60):
        q = ask(view, kind, rng, verify=True)
        if q is not None and q.answer not in found:
            found[q.answer] = q
        if len(found) == 2:
            return [found["yes"], found["no"]]
    return None


def write_mme(root: Path, images_per_subtask: int, seed: int = 0, split: str = "test") -> Path:
    """A mini-MME: the release's folders, two yes/no questions per image, one of each answer."""
    folder = root / "mini_mme"
    for offset, (subtask, kind) in enumerate(MME_SUBTASKS.items()):
        base = folder / subtask
        is_split = subtask in MME_SPLIT_LAYOUT
        images, texts = (base / "images", base / "questions_answers_YN") if is_split else (base, base)
        texts.mkdir(parents=True, exist_ok=True)
        index = FIRST_SCENE["mme"] + offset * 1_000_000
        made = 0
        while made < images_per_subtask:
            scene, rng = draw_scene(split, index, seed), np.random.default_rng([seed, 202, index])
            index += 1
            pair = _yes_no_pair(View(scene), kind, rng)
            if pair is None:
                continue
            _save(scene, images / f"{made:06d}.png")
            lines = [f"{q.text}{MME_SUFFIX}\t{q.answer.capitalize()}\n" for q in pair]
            (texts / f"{made:06d}.txt").write_text("".join(lines), encoding="utf-8")
            made += 1
    return folder


def digest(root: Path) -> str:
    """sha256 over every json and text file and the decoded pixels of every image, in path order."""
    sha = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".json", ".txt", ".png")):
        if path.name == "manifest.json":
            continue
        sha.update(path.relative_to(root).as_posix().encode())
        if path.suffix == ".png":
            with Image.open(path) as image:
                sha.update(np.asarray(image.convert("RGB")).tobytes())
        else:
            sha.update(path.read_bytes())
    return sha.hexdigest()


def write_all(root: Path, sizes: dict[str, int], seed: int = 0, tell: Callable[[str], None] = print) -> dict:
    """Write all sets, then `manifest.json` (sizes, seed, digest); a root whose manifest matches is reused."""
    manifest_path = root / "manifest.json"
    wanted = {"sizes": sizes, "seed": seed, "types": list(TYPES), "format": FORMAT}
    if manifest_path.exists():
        old = json.loads(manifest_path.read_text(encoding="utf-8"))
        if {k: old.get(k) for k in wanted} == wanted:
            tell(f"{root}: already there ({old['sha256'][:12]})")
            return old
    for split in ("train", "calibration", "validation", "test"):
        path = write_instruct(root, split, sizes[split], seed)
        tell(f"{path}: {sizes[split]} samples")
    tell(f"{write_gqa(root, sizes['gqa'], seed)}: {sizes['gqa']} questions")
    tell(f"{write_mme(root, sizes['mme'], seed)}: {len(MME_SUBTASKS)} subtasks x {sizes['mme']} images")
    manifest = {**wanted, "sha256": digest(root)}
    manifest_path.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return manifest

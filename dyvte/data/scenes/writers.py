"""Scenes written in the formats people have: LLaVA instruction json, GQA's layout, MME's folders.

<root>/instruct/{train,calibration,validation,test}.json + instruct/images/<split>/*.png
<root>/instruct/test_unseen.json     (natural style: the test scenes in wordings that no training uses)
<root>/mini_gqa/testdev_balanced_questions.json + mini_gqa/images/*.png
<root>/mini_mme/<subtask>/...        (flat or split layout, as the release has it)
<root>/mini_pope                     (see `pope`)
<root>/mini_refcoco, mini_captions   (natural style: see `grounding`)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dyvte.data.scenes.grounding import write_captions, write_refcoco
from dyvte.data.scenes.pope import write_pope
from dyvte.data.scenes.questions import Question, View
from dyvte.data.scenes.render import save
from dyvte.data.scenes.styles import PLAIN, Style
from dyvte.data.scenes.world import SPLITS, Scene, draw_scene

QUESTIONS_PER_SCENE = 8
"""In mini-GQA."""
FORMAT = 2  # raised whenever the same seed gives other files
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


def _scenes(split: str, first: int, count: int, seed: int) -> Iterator[tuple[Scene, np.random.Generator]]:
    for index in range(first, first + count):
        yield draw_scene(split, index, seed), np.random.default_rng([seed, 101, index])


def write_instruct(
    root: Path, split: str, samples: int, seed: int = 0, style: Style = PLAIN, *, unseen: bool = False
) -> Path:
    """LLaVA instruction data: one single-turn conversation per question, some questions per scene.

    Parameters
    ----------
    root
        The file is ``instruct/<split>.json`` below it.
    split
        Whose scenes and digits are shown.
    samples
        Conversations.
    seed
        Same seed, same files.
    style
        How is asked.
    unseen
        In wordings that no training uses; the file is ``<split>_unseen.json``, the scenes are the split's.
    """
    folder, records = root / "instruct", []
    ask = style.unseen if unseen else style.instruct
    if ask is None:
        raise ValueError("this style has one wording of a question only")
    name = f"{split}_unseen" if unseen else split
    count = -(-samples // style.per_scene)
    for number, (scene, rng) in enumerate(_scenes(split, style.first_scene["instruct"], count, seed)):
        image = f"{split}/{split}_{number:06d}.png"
        save(scene, folder / "images" / image)
        for i, q in enumerate(ask(scene, rng, style.per_scene)):
            turns = [
                {"from": "human", "value": f"<image>\n{q.text}"},
                {"from": "gpt", "value": q.answer},
            ]
            ident = f"{name}_{number:06d}_{i:02d}"
            records.append({"id": ident, "image": image, "type": q.type, "conversations": turns})
    path = folder / f"{name}.json"
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


def write_gqa(root: Path, questions: int, seed: int = 0, split: str = "test", style: Style = PLAIN) -> Path:
    """A mini-GQA: GQA's own questions file and images folder, question types as even as scenes allow.

    Parameters
    ----------
    root
        Folder that is written.
    questions
        How many.
    seed
        Of the scenes.
    split
        Of the scenes.
    style
        How they are drawn.
    """
    folder, records = root / "mini_gqa", {}
    count = -(-questions // QUESTIONS_PER_SCENE)
    for number, (scene, rng) in enumerate(_scenes(split, style.first_scene["gqa"], count, seed)):
        image_id = f"s{number:06d}"
        save(scene, folder / "images" / f"{image_id}.png")
        for i, q in enumerate(style.short(scene, rng, QUESTIONS_PER_SCENE)):
            records[f"{number:06d}{i:02d}"] = _gqa_record(q, image_id)
    kept = dict(list(records.items())[:questions])
    path = folder / "testdev_balanced_questions.json"
    path.write_text(json.dumps(kept, indent=0), encoding="utf-8")
    return path


def _yes_no_pair(style: Style, view: View, kind: str, rng: np.random.Generator) -> list[Question] | None:
    """One question of `kind` whose answer is yes and one whose answer is no."""
    found: dict[str, Question] = {}
    for _ in range(60):
        q = style.verify(view, kind, rng)
        if q is not None and q.answer not in found:
            found[q.answer] = q
        if len(found) == 2:
            return [found["yes"], found["no"]]
    return None


def write_mme(
    root: Path, images_per_subtask: int, seed: int = 0, split: str = "test", style: Style = PLAIN
) -> Path:
    """A mini-MME: the release's folders, two yes/no questions per image, one of each answer.

    Parameters
    ----------
    root
        Folder that is written.
    images_per_subtask
        Two questions each.
    seed
        Of the scenes.
    split
        Of the scenes.
    style
        How they are drawn.
    """
    folder = root / "mini_mme"
    for offset, (subtask, kind) in enumerate(MME_SUBTASKS.items()):
        base = folder / subtask
        is_split = subtask in MME_SPLIT_LAYOUT
        images, texts = (base / "images", base / "questions_answers_YN") if is_split else (base, base)
        texts.mkdir(parents=True, exist_ok=True)
        index = style.first_scene["mme"] + offset * 1_000_000
        made = 0
        while made < images_per_subtask:
            scene, rng = draw_scene(split, index, seed), np.random.default_rng([seed, 202, index])
            index += 1
            pair = _yes_no_pair(style, View(scene), kind, rng)
            if pair is None:
                continue
            save(scene, images / f"{made:06d}.png")
            lines = [f"{q.text}{MME_SUFFIX}\t{q.answer.capitalize()}\n" for q in pair]
            (texts / f"{made:06d}.txt").write_text("".join(lines), encoding="utf-8")
            made += 1
    return folder


def digest(root: Path) -> str:
    """sha256 over every json, jsonl and text file and the decoded pixels of every image, in path order."""
    sha = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".json", ".jsonl", ".txt", ".png")):
        if path.name == "manifest.json":
            continue
        sha.update(path.relative_to(root).as_posix().encode())
        if path.suffix == ".png":
            with Image.open(path) as image:
                sha.update(np.asarray(image.convert("RGB")).tobytes())
        else:
            sha.update(path.read_bytes())
    return sha.hexdigest()


def write_all(
    root: Path,
    sizes: dict[str, int],
    seed: int = 0,
    tell: Callable[[str], None] = print,
    style: Style = PLAIN,
) -> dict:
    """Write all sets, then `manifest.json` (sizes, seed, digest); a root whose manifest matches is reused.

    Parameters
    ----------
    root
        Folder that is written.
    sizes
        Of each set, by name.
    seed
        Of the scenes.
    tell
        Called with what is being written.
    style
        How scenes are drawn.
    """
    manifest_path = root / "manifest.json"
    wanted = {"sizes": sizes, "seed": seed, "types": list(style.types), "format": FORMAT}
    if style.name:
        wanted["style"] = style.name
    if manifest_path.exists():
        old = json.loads(manifest_path.read_text(encoding="utf-8"))
        if {k: old.get(k) for k in wanted} == wanted:
            tell(f"{root}: already there ({old['sha256'][:12]})")
            return old
    for split in SPLITS:
        path = write_instruct(root, split, sizes[split], seed, style)
        tell(f"{path}: {sizes[split]} samples")
    if "unseen" in sizes:
        path = write_instruct(root, "test", sizes["unseen"], seed, style, unseen=True)
        tell(f"{path}: {sizes['unseen']} samples")
    tell(f"{write_gqa(root, sizes['gqa'], seed, style=style)}: {sizes['gqa']} questions")
    folder = write_mme(root, sizes["mme"], seed, style=style)
    tell(f"{folder}: {len(MME_SUBTASKS)} subtasks x {sizes['mme']} images")
    if "pope" in sizes:
        path = write_pope(root / "mini_pope", sizes["pope"], style.first_scene["pope"], seed)
        tell(f"{path}: {sizes['pope']} images")
    if "refcoco" in sizes:
        path = write_refcoco(root / "mini_refcoco", sizes["refcoco"], style.first_scene["refcoco"], seed)
        tell(f"{path}: {sizes['refcoco']} expressions")
    if "captions" in sizes:
        path = write_captions(root / "mini_captions", sizes["captions"], style.first_scene["captions"], seed)
        tell(f"{path}: {sizes['captions']} images")
    manifest = {**wanted, "sha256": digest(root)}
    manifest_path.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return manifest

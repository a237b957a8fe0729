"""MVBench (Li et al., 2024): twenty kinds of multiple-choice questions about short videos.

Sources: ``video_chat2/mvbench.ipynb``, ``check_ans`` (``original``: the first word of the answer's first
line is part of "(a)", or holds it); ``lmms_eval/tasks/mvbench/utils.py`` (``lmms``: an empty answer is left
out); ``vlmeval/dataset/utils/mvbench.py`` with exact matching (``vlmevalkit``). An empty answer is RIGHT by
the original rule and by VLMEvalKit's, for nothing is part of everything: ``num_empty`` says how many there
are, and ``accuracy_empty_wrong`` counts them wrong.

Five kinds ask about a part of their video. The video branch of the data set has these parts as files, which
are taken where they are; else the whole video's frames between ``start`` and ``end`` seconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dyvte.readers.files import find_folder
from dyvte.readers.rows import Row, read_rows
from dyvte.readers.videos import VIDEO_EXTENSIONS, Video, find_video
from dyvte.tasks.answers.choices import Options, vlmevalkit_letter
from dyvte.tasks.answers.vqa import without_punctuation
from dyvte.tasks.base import TASKS, Predictions, Question
from dyvte.tasks.choices import ChoiceBenchmark, listed_options
from dyvte.tasks.metrics import breakdown, percent

_REQUEST = "\nOnly give the best option."
_CHARADES = ("star/Charades_segment", "star/Charades_v1_480")
_PERCEPTION, _CLEVRER = ("perception/videos",), ("clevrer/video_validation",)
FOLDERS: dict[str, tuple[str, ...]] = {
    "action_antonym": ("ssv2_video_mp4", "ssv2_video"),
    "action_count": _PERCEPTION,
    "action_localization": ("sta/sta_video_segment", "sta/sta_video"),
    "action_prediction": _CHARADES,
    "action_sequence": _CHARADES,
    "character_order": _PERCEPTION,
    "counterfactual_inference": _CLEVRER,
    "egocentric_navigation": ("vlnqa",),
    "episodic_reasoning": ("tvqa/video_fps3_hq_segment", "tvqa/frames_fps3_hq"),
    "fine_grained_action": ("Moments_in_Time_Raw/videos",),
    "fine_grained_pose": ("nturgbd_convert", "nturgbd"),
    "moving_attribute": _CLEVRER,
    "moving_count": _CLEVRER,
    "moving_direction": _CLEVRER,
    "object_existence": _CLEVRER,
    "object_interaction": _CHARADES,
    "object_shuffle": _PERCEPTION,
    "scene_transition": ("scene_qa/video",),
    "state_change": _PERCEPTION,
    "unexpected_action": ("FunQA_test/test",),
}
"""Where the videos of each kind lie, below ``video/``: the parts first, then the whole videos."""
_LETTER_FIRST = re.compile(r"([A-E])\.\s*(.+)$", re.IGNORECASE)
_LETTER_ANYWHERE = re.compile(r"\b([A-E])\b", re.IGNORECASE)


@TASKS.register
class MVBench(ChoiceBenchmark):
    """All kinds of questions that are there."""

    name = "mvbench"
    title = "MVBench"
    unit = "video"
    suffix = _REQUEST
    submission_name = "mvbench_answers.json"
    expected_tree = (
        "  <root>/\n"
        "    json/<kind>.json               (or MVBench.tsv of VLMEvalKit)\n"
        "    video/<folder>/<video>         (e.g. video/clevrer/video_validation/; or without video/)"
    )
    tables = ("MVBench.tsv", "MVBench_MP4.tsv", "*mvbench*.tsv")
    columns = (("question",), ("answer",), ("candidates",), ("video",), ("task_type",))

    def sources(self):
        """The release's files, VLMEvalKit's table."""
        return self._release, self.table

    def _release(self, root: Path) -> list[Question] | None:
        folder = root / "json" if (root / "json").is_dir() else root
        found = {kind: folder / f"{kind}.json" for kind in FOLDERS}
        there = {kind: path for kind, path in found.items() if path.is_file()} if root.is_dir() else {}
        if not there:
            return None
        return [
            _question(row, f"{kind}_{number}", kind, root)
            for kind, path in there.items()
            for number, row in enumerate(read_rows(path))
        ]

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """The kind is written in words ("Action Sequence")."""
        kind = re.sub(r"[\s-]+", "_", row.text("task_type").strip().lower())
        return _question(row, row.identity("index", default=str(number - 1)), kind, base)

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """The tool's verdict."""
        return [is_right(predictions.texts[q.id], q, dialect) for q in questions]

    def metrics(
        self, questions: Sequence[Question], hits: Sequence[bool], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """Accuracy in percent over all that the tool counts, and by kind; empty answers."""
        empty = [not predictions.texts[q.id].strip() for q in questions]
        counted = [n for n in range(len(questions)) if dialect != "lmms" or not empty[n]]
        kept = [hits[n] for n in counted]
        return {
            "accuracy": percent(kept),
            "accuracy_empty_wrong": percent(
                [hit and not none for hit, none in zip(hits, empty, strict=True)]
            ),
            "num_empty": sum(empty),
            "per_kind": breakdown([questions[n].kind for n in counted], kept),
        }

    def stratum(self, question: Question) -> str:
        """There are 200 questions of each kind."""
        return question.kind


def is_right(text: str, question: Question, dialect: str) -> bool:
    """Whether the tool of ``dialect`` takes an answer for the gold one."""
    gold, options = str(question.answer), question.details["options"]
    if dialect == "lmms":
        return lmms_option(text.strip()) == gold
    if dialect == "original":
        return _first_word_fits(text.strip().split("\n")[0], gold)
    return _first_word_fits(text, gold) or vlmevalkit_letter(text, options) == gold


def _first_word_fits(text: str, letter: str) -> bool:
    word, gold = text.lower().strip().split(" ")[0], f"({letter.lower()})"
    return word.replace(".", "") in gold or gold in word


def lmms_option(text: str) -> str:
    """What lmms-eval's ``mcq_acc`` compares: the letter of "A. text", else of the first lone letter, else the
    answer in lower case without punctuation."""
    match = _LETTER_FIRST.match(text.strip())
    if match:
        return match[1].upper()
    plain = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    plain = plain.strip("'").strip('"').strip(")").strip("(").strip().lower()
    match = _LETTER_ANYWHERE.search(plain)
    return match[1].upper() if match else plain


def _question(row: Row, identity: str, kind: str, root: Path) -> Question:
    name, options = row.text("video"), listed_options(row, row.texts("candidates"))
    span, place = _span(row), f"{FOLDERS.get(kind, (kind,))[-1]}/{name}"
    stem = next((name[: -len(end)] for end in VIDEO_EXTENSIONS if name.lower().endswith(end)), name)
    return Question(
        id=identity,
        image=None,
        text="\n".join([f"Question: {row.text('question')}", "Options:", *_shown(options)]),
        answer=_gold(row, options),
        image_id=place,
        kind=kind,
        details={"options": options},
        video=_video(row, kind, root, stem, span),
    )


def _video(row: Row, kind: str, root: Path, stem: str, span: tuple[float, float] | None) -> Video:
    """The part's own file where it is there, else the whole video and which part is meant."""
    video = find_video(row, _folders(row, kind, root), stem)
    parts = [folder for folder in FOLDERS.get(kind, ()) if folder.endswith("_segment")]
    cut = any(folder in video.path.as_posix() for folder in parts)
    return video if cut or span is None else replace(video, span=span)


def _span(row: Row) -> tuple[float, float] | None:
    """From when to when the question asks, in seconds; the release says so for five kinds."""
    ends = [row.value("start"), row.value("end")]
    if None in ends:
        return None
    try:
        start, end = float(ends[0]), float(ends[1])
    except (TypeError, ValueError, OverflowError):
        raise row.error(f"a part from {ends[0]!r} to {ends[1]!r}: expected seconds") from None
    if not 0 <= start <= end < 1e9:
        raise row.error(f"a part from {start} to {end} seconds")
    return start, end


def _folders(row: Row, kind: str, root: Path) -> list[Path]:
    """Where the video may lie, the best first."""
    above = find_folder(root, "video")
    stated = row.text("prefix", default="")
    named = (*FOLDERS.get(kind, ()), stated.strip("/").removeprefix("video/"))
    found = (folder for name in named if name for folder in (above / name, above / "data0613" / name))
    return [*found, above]


def _shown(options: Options) -> list[str]:
    return [f"({letter}) {text}" for letter, text in options.items()]


def _gold(row: Row, options: Options) -> str:
    """The letter of the option that the gold answer is, which the release writes out."""
    gold = row.text("answer")
    found = [letter for letter, text in options.items() if text == gold]
    if not found:
        raise row.error(f"the answer {gold!r} is none of its {len(options)} candidates")
    return found[0]

"""CHAIR and MVBench: their rules by hand, parts of videos, and the tools' own functions on fuzz."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import string
from collections import defaultdict

import pytest

from dyvte.errors import DataError
from dyvte.readers.videos import Video, read_frames
from dyvte.tasks.answers.chair import Objects
from dyvte.tasks.base import Predictions, Question, get_benchmark
from dyvte.tasks.mvbench import FOLDERS, lmms_option
from tests.helpers.benchmark_files import picture, put, put_frames, write_benchmark
from tests.helpers.minis.clips import SYNONYMS
from tests.helpers.mutations import seeded
from tests.helpers.tools import LMMS, VLMEVAL, answers, functions, source

ANSWERS = answers(seeded(20261104), 1500)
OBJECTS = Objects.of([line.split(",") for line in SYNONYMS.splitlines()])


# --- CHAIR ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("Two dogs, a puppy and a Man.", ["dog", "dog", "person"]),
        ("People eat hot dogs; a hot dog.", ["person", "hot dog", "hot dog"]),
        ("hot, dog", ["dog"]),  # no pair with a comma between
        ("hot-dog", []),  # one word, and no synonym
        ("a cell phone, a phone", ["cell phone", "cell phone"]),
        ("the seat of the toilet", ["toilet"]),  # no chair
        ("a toilet seat", ["toilet"]),
        ("a seat", ["chair"]),
        ("an adult dog and a baby bird", ["dog"]),
        ("buses, women, policemen, players and wine glasses", ["bus", "person", "person", "wine glass"]),
        ("the dog's cups", ["dog", "cup"]),
        ("", []),
        ("I'm sorry, I can't describe it.", []),
    ],
)
def test_objects_of_a_caption_by_hand(caption, named):
    assert OBJECTS.named(caption) == named


def test_pairs_of_other_lists_are_read_too():
    """As the embedded scenes name their objects."""
    objects = Objects.of([["red circle"], ["blue circle"], ["orange arrow"], ["red digit"]])
    caption = "Row 1 has a red circle, a blue digit 7 and an orange arrow pointing up. Two red circles."
    assert objects.named(caption) == ["red circle", "orange arrow", "red circle"]


def test_chair_by_hand(tmp_path):
    benchmark = get_benchmark("chair")
    for form in ("coco", "parquet"):
        questions = benchmark.load(write_benchmark(tmp_path / form, "chair", form))
        assert [q.answer for q in questions] == ["chair, dog, person", "cell phone", ""]
        texts = {"0": "A dog, two dogs and a cup.", "1": "A phone.", "2": "Nothing but a bus and a man."}
        scores = benchmark.score(questions, Predictions(texts))
        found = {name: scores[name] for name in ("chair_s", "chair_i", "recall", "num_objects_named")}
        assert found == pytest.approx(
            {"chair_s": 200 / 3, "chair_i": 50, "recall": 50, "num_objects_named": 6}
        )
        assert benchmark.headline(scores) == "66.7 / 50.0 / 50.0"
        assert benchmark.correct(questions, Predictions(texts)) == [False, True, False]
    texts = dict.fromkeys("012", "I cannot help.")
    scores = benchmark.score(questions, Predictions(texts))
    assert (scores["chair_s"], scores["chair_i"], scores["recall"]) == (0, 0, 0)


def test_chair_names_what_its_files_lack(tmp_path):
    benchmark = get_benchmark("chair")
    root = write_benchmark(tmp_path, "chair", "coco")
    instances = root / "annotations" / "instances_val2014.json"
    content = json.loads(instances.read_text())
    for change, problem in (
        ({"categories": content["categories"][1:]}, "no category 0"),
        (
            {"categories": [{"id": n, "name": "unicorn"} for n in range(9)]},
            "'unicorn' is no object of synonyms",
        ),
    ):
        put(instances, {**content, **change})
        with pytest.raises(DataError, match=problem):
            benchmark.load(root)
    put(instances, content)
    (root / "synonyms.txt").write_text("\n,\n")
    with pytest.raises(DataError, match="names no object"):
        benchmark.load(root)
    (root / "synonyms.txt").unlink()
    with pytest.raises(DataError, match=r"has no synonyms.txt .*CHAIR's repository"):
        benchmark.load(root)


PLURALS = {"dogs": "dog", "people": "person", "men": "man", "buses": "bus", "boxes": "box", "knives": "knife"}
PLURALS |= {"children": "child", "cups": "cup", "ladies": "lady", "horses": "horse", "giraffes": "giraffe"}
PLURALS |= {"umbrellas": "umbrella", "sandwiches": "sandwich", "puppies": "puppy", "skis": "ski"}


class _Words:
    """Stands in for nltk, whose data are not installed: words, no tags, plurals by table."""

    class Lemmatizer:
        def lemmatize(self, word, pos=None):
            return PLURALS.get(word, word)

    @staticmethod
    def word_tokenize(text):
        return re.findall(r"\w+(?:-\w+)*|'\w+|[^\w\s]", text)

    @staticmethod
    def pos_tag(words):
        return [(word, "X") for word in words]


@pytest.fixture(scope="module")
def chair():
    names = ("caption_to_words", "MSCOCO_OBJECTS", "INVERSE_SYNONYM_DICT", "DOUBLE_WORD_DICT")
    totals = [f"coco_cap_chair_aggregate_results_{name}" for name in ("chair_i", "chair_s", "recall")]
    wordnet = type("wordnet", (), {"NOUN": "n", "ADJ": "a", "VERB": "v", "ADV": "r"})
    given = {"nltk": _Words, "wordnet": wordnet, "WordNetLemmatizer": _Words.Lemmatizer}
    return functions(LMMS, "tasks/coco_cap_chair/utils.py", *names, *totals, **given)


def _captions(words, count):
    draw = seeded(20261105)
    pieces = [*words, *PLURALS, "a", "the", "red", "and", "of", "baby", "adult", "passenger", "two", "seat"]
    pieces += [
        "toilet",
        "hot",
        "teddy",
        "bow",
        "train",
        "jet",
        "bear",
        "street-light",
        "toilet seat",
        "glass",
    ]
    joints = (" ", " ", " ", " ", ", ", ". ", "; ", "'s ", " - ")
    return [
        "".join(draw.choice(pieces) + draw.choice(joints) for _ in range(draw.randrange(1, 14)))
        for _ in range(count)
    ]


def test_chair_of_lmms_eval(chair):
    """Its list of COCO's objects is CHAIR's; "train track" is its own addition."""
    by_object = defaultdict(list)
    for word, name in chair["INVERSE_SYNONYM_DICT"].items():
        by_object[name].append(word)
    objects = Objects.of([[name, *words] for name, words in by_object.items()])
    # entries that no caption fits, as they stand in the tool: capitals, blanks in front
    words = [word for word in chair["MSCOCO_OBJECTS"] if word == word.strip().lower()]
    draw = random.Random(12)
    questions, texts, rows = [], {}, []
    for n, caption in enumerate(text for text in _captions(words, 1500) if "train track" not in text):
        named = chair["caption_to_words"](caption)[1]
        assert objects.named(caption) == named, caption
        held = frozenset(draw.sample(sorted(by_object), 3) + named[:1])
        details = {"objects": held, "synonyms": objects}
        questions.append(
            Question(id=str(n), image=None, text="?", answer="", image_id=str(n), kind="", details=details)
        )
        texts[str(n)] = caption
        rows.append({"answer": sorted(held), "pred": named})
    scores = get_benchmark("chair").score(questions, Predictions(texts))
    for name in ("chair_i", "chair_s", "recall"):
        expected = chair[f"coco_cap_chair_aggregate_results_{name}"](rows)
        assert scores[name] == pytest.approx(expected), name


def test_plurals_are_those_of_textblob(chair):
    """Its ``singularize`` is ``pattern``'s, which CHAIR uses; what that breaks is listed."""
    spec = importlib.util.spec_from_file_location("inflect", source("textblob", "en/inflect.py"))
    inflect = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(inflect)
    words = sorted({word for word in chair["MSCOCO_OBJECTS"] if word.isalpha() and word.islower()})
    objects = Objects.of([[word] for word in words])
    broken = set()
    for word in words:
        for form in (word, inflect.pluralize(word)):
            theirs = inflect.singularize(form)
            ours = objects._singular(form)
            if theirs in objects.name_of or ours in objects.name_of:
                broken |= {(form, theirs)} if theirs != ours else set()
    assert {form for form, theirs in broken if theirs not in objects.name_of} == {
        *("airbus", "bus", "minibus", "canoes", "magpies", "ties", "oxens"),
    }
    # the same object in CHAIR's list; "kine", of cows, is read by none today
    assert {form for form, theirs in broken if theirs in objects.name_of} == {
        *("children", "oxen", "people", "skis", "doggies", "kine"),
    }


# --- MVBench --------------------------------------------------------------------------------------------


def _clip(gold="A", options=None, number=0):
    details = {"options": options or {"A": "a cat", "B": "dog", "C": "the red one"}}
    own = {"id": str(number), "answer": gold, "image_id": str(number), "kind": "k", "details": details}
    return Question(image=None, text="?", **own)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        *(("A", True), ("(A) a cat", True), ("a. a cat", True), ("a)", True), ("(", True), ("", True)),
        *(("B", False), ("The answer is A", False), ("a cat", True), ("cat", False), ("(A)x y", True)),
        ("B\n(A)", False),  # the first line counts
    ],
)
def test_check_ans_by_hand(text, right):
    assert get_benchmark("mvbench").correct([_clip()], Predictions({"0": text})) == [right]


def test_empty_answers_are_told(tmp_path):
    benchmark = get_benchmark("mvbench")
    questions = benchmark.load(write_benchmark(tmp_path, "mvbench", "release"))
    assert [(q.kind, q.answer, q.image_id) for q in questions] == [
        ("action_sequence", "B", "star/Charades_v1_480/clip1.mp4"),
        ("action_sequence", "A", "star/Charades_v1_480/clip1.mp4"),
        ("moving_count", "B", "clevrer/video_validation/video_0.mp4"),
    ]
    assert benchmark.prompt(questions[2]).endswith(
        "?\nOptions:\n(A) 1\n(B) 2\n(C) 3\nOnly give the best option."
    )
    texts = dict(zip((q.id for q in questions), ("", "(A)", "C"), strict=True))
    found = {d: benchmark.score(questions, Predictions(texts), d) for d in benchmark.dialects}
    assert [found[d]["accuracy"] for d in benchmark.dialects] == pytest.approx([200 / 3, 50, 200 / 3])
    assert {found[d]["accuracy_empty_wrong"] for d in benchmark.dialects} == {100 / 3}
    assert {found[d]["num_empty"] for d in benchmark.dialects} == {1}


def test_parts_of_a_video(tmp_path):
    benchmark = get_benchmark("mvbench")
    root = write_benchmark(tmp_path, "mvbench", "release")
    part, whole = (benchmark.load(root)[n].video for n in (0, 2))
    assert (part.span, whole.span) == ((1.0, 3.0), None)
    # twelve frames, three a second: frames 3 to 9 of 0 to 11, of which three are taken
    frames = [frame.getpixel((0, 0)) for frame in read_frames(part, 3)]
    assert frames == [_colour(n + 1) for n in (3, 6, 9)]
    put_frames(root / "video" / "star" / "Charades_segment" / "clip1", 2)
    assert benchmark.load(root)[0].video.span is None  # the part's own file
    with pytest.raises(DataError, match="holds no frame between 7 and 9 seconds"):
        read_frames(Video(part.path, (7, 9)), 3)
    path = root / "json" / "action_sequence.json"
    rows = json.loads(path.read_text())
    for start, end in ((3, 1), (-1, 2), ("x", 2), (0, 1e300)):
        put(path, [{**rows[0], "start": start, "end": end}])
        with pytest.raises(DataError, match="row 1: a part from"):
            benchmark.load(root)
    put(path, [{**rows[0], "answer": "something else"}])
    with pytest.raises(DataError, match="the answer 'something else' is none of its 2 candidates"):
        benchmark.load(root)


def _colour(n):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(picture(n))).convert("RGB").getpixel((0, 0))


def test_mvbench_of_lmms_eval():
    names = ("mcq_acc", "mvbench_process_results", "mvbench_aggregate_results", "DATA_LIST")
    tool = functions(LMMS, "tasks/mvbench/utils.py", *names, re=re, string=string)
    assert {kind: folders[0] for kind, folders in FOLDERS.items()} == tool["DATA_LIST"]
    draw = random.Random(13)
    questions, texts, rows = [], {}, []
    for n, text in enumerate((*ANSWERS, *[""] * 20)):
        gold = draw.choice("ABC")
        questions.append(_clip(gold, number=n))
        texts[str(n)] = text
        options = list(questions[-1].details["options"].values())
        doc = {"candidates": options, "answer": options["ABC".index(gold)]}
        rows.append(tool["mvbench_process_results"](doc, [text.strip()])["mvbench_accuracy"])
        assert (lmms_option(text.strip()) == gold) == bool(rows[-1]["score"]), ascii(text)
    scores = get_benchmark("mvbench").score(questions, Predictions(texts), "lmms")
    assert scores["accuracy"] == pytest.approx(tool["mvbench_aggregate_results"](rows))


def test_mvbench_of_vlmevalkit():
    import copy
    import os

    given = {"cp": copy, "os": os, "string": string, "logger": __import__("logging").getLogger("x")}
    names = ("can_infer_option", "can_infer_text", "can_infer")
    can_infer = functions(VLMEVAL, "utils/matching_util.py", *names, **given)["can_infer"]

    def extract(model, item, name):
        choices = {letter: item[letter] for letter in "ABC"}
        return {"opt": can_infer(item["prediction"], choices) or "Z"}

    tool = functions(
        VLMEVAL,
        "dataset/utils/mvbench.py",
        "check_ans",
        "check_ans_with_model",
        extract_answer_from_item=extract,
    )
    draw = random.Random(14)
    for text in ANSWERS:
        question = _clip(draw.choice("ABC"))
        options, gold = question.details["options"], question.answer
        written = f"({gold}) {options[gold]}"
        item = {**options, "prediction": text, "answer": gold}
        if not re.search(r"answer\s+is", text, re.IGNORECASE):  # read by VLMEvalKit after ms-vlmeval 0.0.20
            expected = tool["check_ans_with_model"](text, written, None, item)
            found = get_benchmark("mvbench").correct([question], Predictions({"0": text}), "vlmevalkit")
            assert found == [expected], ascii(text)
        first = text.strip().split("\n")[0]
        expected = tool["check_ans"](first, written)  # but for blanks, the original's
        assert get_benchmark("mvbench").correct([question], Predictions({"0": text})) == [expected], ascii(
            text
        )

"""Multiple choice: what each tool takes for the chosen letter, by values worked out from the published rules;
circular evaluation; MMMU's chance."""

from __future__ import annotations

import random
import zipfile
from xml.etree import ElementTree

import pytest

from dyvte.errors import DataError
from dyvte.tasks import ai2d, mmbench, scienceqa, seed
from dyvte.tasks.answers.choices import vlmevalkit_letter
from dyvte.tasks.answers.mmmu_open import gold_forms, is_right, read_open
from dyvte.tasks.base import Predictions, get_benchmark
from dyvte.tasks.mmmu import read_letter
from tests.helpers.benchmark_files import LETTERS, mmbench_rows, put_tsv, write_benchmark

OPTIONS = {"A": "a cat", "B": "dog", "C": "the red one", "D": "40"}
DIALECTS = ("original", "lmms", "vlmevalkit")


@pytest.mark.parametrize(
    ("answer", "original", "lmms", "vlmevalkit"),
    [
        ("B", "B", "B", "B"),
        (" B\n", "B", "B", "B"),
        ("b", None, "B", None),
        ("B.", None, "B", "B"),
        ("B. dog", "B", "B", "B"),
        ("B.dog", None, "B", "B"),
        ("B\nbecause", None, None, "B"),
        ("The answer is B.", "B", None, "B"),
        # LLaVA's tool wants a character behind the letter, on the same line, and one such sentence
        ("The answer is B", None, None, "B"),
        ("The answer is B\nor so", None, None, "B"),
        ("The answer is B\u2028or so", "B", None, "B"),
        ("The answer is C, no: The answer is B.", None, None, "C"),
        ("The answer is E.", None, None, None),
        ("the answer is B", None, None, "B"),
        ("(B)", None, None, "B"),
        ("dog", None, None, "B"),
        ("It is a dog, no doubt about it", None, None, "B"),
        # longer than twice all options together: VLMEvalKit looks for no text in it
        ("It is a dog, no doubt about it, whatever you say", None, None, None),
        ("A dog", None, None, "A"),
        ("B, not C", None, None, None),
        ("E", None, "E", None),
        ("B\u2028", "B", "B", "B"),
        ("", None, None, None),
    ],
)
def test_scienceqa(answer, original, lmms, vlmevalkit):
    assert [scienceqa.read_answer(answer, OPTIONS, d) for d in DIALECTS] == [original, lmms, vlmevalkit]


@pytest.mark.parametrize(
    ("answer", "original", "lmms", "vlmevalkit"),
    [
        ("B", True, True, True),
        ("b", False, True, False),
        ("B.", False, True, True),
        ("B. dog", False, True, True),
        ("(B)", False, True, True),
        ("B)", False, True, True),
        ("dog", False, False, True),
        ("B dog", False, False, True),
        ("C. dog", False, False, False),
        ("B is the only one that fits here", False, False, False),
        ("", False, False, False),
    ],
)
def test_ai2d(answer, original, lmms, vlmevalkit):
    right = [ai2d.read_answer(answer, OPTIONS, d) == "B" for d in DIALECTS]
    assert right == [original, lmms, vlmevalkit]


@pytest.mark.parametrize(
    ("answer", "original", "lmms", "vlmevalkit"),
    [
        ("B", True, True, True),
        ("b", False, True, False),
        ("B.", False, True, True),
        ("Because", False, True, False),
        ("(B)", False, False, True),
        ("dog", False, False, True),
        ("", False, False, False),
    ],
)
def test_seed(answer, original, lmms, vlmevalkit):
    right = [seed.read_answer(answer, OPTIONS, d) == "B" for d in DIALECTS]
    assert right == [original, lmms, vlmevalkit]


@pytest.mark.parametrize(
    ("answer", "original", "lmms", "vlmevalkit"),
    [
        ("B", "B", "B", "B"),
        ("B.", "B", "B", "B"),
        ("(B).", "B", "B", "B"),
        ("dog", "B", "B", "B"),
        # "A" may be an article in an answer of more than three words; then the option's text decides
        ("A big dog runs", "B", "B", "A"),
        ("A dog", "A", "A", "A"),
        ("A or B", None, "A", None),
        # VLMEvalKit takes no letter that more than four words follow, nor text in too long an answer
        ("B is what I would say in this case", "B", "B", None),
        ("I choose B)", "B", "B", "B"),
        ("[B]", None, "B", "B"),
        ("nothing", None, None, None),
        ("E", "E", "E", None),
        ("", None, None, None),
    ],
)
def test_mmbench(answer, original, lmms, vlmevalkit):
    assert [mmbench.read_answer(answer, OPTIONS, d) for d in DIALECTS] == [original, lmms, vlmevalkit]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("Of A and C, the answer is **B**", "B"),
        ("A or C? The Correct Answer IS\n***c*** then", "C"),
        ("A cat is B, so the answer is d not A", "D"),
        # more than four words behind the only letter
        ("The answer is B as far as I can see it here", "B"),
        ("A, B: the answer is E", None),
        ("A, B: the answer is: C", None),
        ("A, B: the answer is (C)", None),
        # the first such place decides, whatever it leads to
        ("A, B: the answer is dog, so answer is A", "D"),
        ("A, B: the answer is C", None),
    ],
)
def test_verbose_answers_of_vlmevalkit(answer, letter):
    """Worked out from matching_util.py at d21c5e9; the third option is blank in the last case."""
    options = {k: v for k, v in OPTIONS.items() if k != "C"} if answer.endswith("is C") else OPTIONS
    assert vlmevalkit_letter(answer, options) == letter


@pytest.fixture
def rotated(tmp_path):
    return get_benchmark("mmbench").load(write_benchmark(tmp_path, "mmbench", "tsv"))


def test_circular_evaluation_wants_every_rotation(rotated):
    benchmark = get_benchmark("mmbench")
    texts = {q.id: q.answer for q in rotated}
    assert benchmark.score(rotated, Predictions(texts))["accuracy"] == 100
    texts["2000001"] = "Z"  # a rotation of the second question
    scores = benchmark.score(rotated, Predictions(texts))
    assert scores["accuracy"] == pytest.approx(200 / 3)
    assert (scores["vanilla_accuracy"], scores["circular"], scores["num_circular_groups"]) == (100, True, 3)
    assert scores["per_category"] == {
        "color": {"accuracy": 100.0, "num_questions": 1},
        "count": {"accuracy": 50.0, "num_questions": 2},
    }
    # always "A": every question is right in one of its four rotations
    always = benchmark.score(rotated, Predictions({q.id: "A" for q in rotated}))
    assert always["accuracy"] == 0
    assert sum(benchmark.correct(rotated, Predictions({q.id: "A" for q in rotated}))) == 3


def test_unrotated_rows_alone_say_so_and_lost_ones_are_refused(tmp_path):
    benchmark = get_benchmark("mmbench")
    put_tsv(tmp_path / "mmbench_dev_20230712.tsv", mmbench_rows()[:3])
    questions = benchmark.load(tmp_path)
    scores = benchmark.score(questions, Predictions({q.id: q.answer for q in questions}))
    assert (scores["accuracy"], scores["circular"]) == (100, False)
    put_tsv(tmp_path / "mmbench_dev_20230712.tsv", [r for r in mmbench_rows() if r["index"] != 1])
    with pytest.raises(DataError, match=r"rotations of questions that are not there|neither base64"):
        benchmark.load(tmp_path)


def test_a_limit_keeps_whole_groups(tmp_path, rotated):
    benchmark = get_benchmark("mmbench")
    kept = benchmark.load(tmp_path, limit=1)
    assert sorted(q.id for q in kept) == sorted(q.id for q in rotated if q.details["group"] == "0")


def test_the_workbook_holds_what_the_server_takes(tmp_path):
    benchmark = get_benchmark("mmbench")
    put_tsv(tmp_path / "MMBench_TEST_EN.tsv", mmbench_rows(answers=False))
    questions = benchmark.load(tmp_path)
    predictions = Predictions({q.id: f"a < b & c\u0001 {q.id}" for q in questions})
    assert benchmark.score(questions, predictions)["graded"] is False
    path = benchmark.write_submission(tmp_path, questions, predictions)
    with zipfile.ZipFile(path) as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
        names = archive.namelist()
    assert "[Content_Types].xml" in names
    rows = [["".join(cell.itertext()) for cell in row] for row in sheet.iter() if row.tag.endswith("}row")]
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "answer", "prediction"]
    assert len(rows) == 1 + len(questions)
    first = questions[0]
    assert rows[1] == [
        "0",
        "what color is the circle ?",
        *first.details["options"].values(),
        "",
        "a < b & c 0",
    ]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B. dog", "B"),
        ("Answer:B", "B"),
        ("(A) is wrong, so (C)", "C"),
        ("A or B", "B"),
        ("I think that the animal is the dog", "B"),
        ("first the red one, then after that a cat", "A"),
        ("the dog", None),
        ("b", None),
        ("", None),
    ],
)
def test_mmmu_letters(answer, letter):
    assert read_letter(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "golds", "right"),
    [
        ("3.5", ["3.50"], True),
        ("The result is 3.5 volts", ["3.50"], True),
        ("3.504", ["3.5"], True),
        ("3.51", ["3.5"], False),
        ("1,234", ["1234"], True),
        ("x = 12", ["12"], True),
        ("It is blue.", ["Blue"], True),
        ("bluebird", ["blue"], True),
        ("seven", ["7", "seven"], True),
        ("a b", ["b"], True),
        ("ab", ["b"], False),
        ("12 or 13", ["13"], True),
        ("", ["7"], False),
    ],
)
def test_mmmu_open_answers(answer, golds, right):
    assert is_right(read_open(answer), gold_forms(golds)) is right


def test_mmmu_draws_unreadable_answers_in_the_official_order(tmp_path):
    benchmark = get_benchmark("mmmu")
    questions = benchmark.load(write_benchmark(tmp_path, "mmmu", "release"))
    texts = {q.id: "who knows" for q in questions}
    scores = benchmark.score(questions, Predictions(texts))
    draw = random.Random(42)  # subjects alphabetically, questions as stored; open questions draw nothing
    ordered = [q for kind in ("Art_Theory", "Math") for q in questions if q.kind == kind]
    expected = {q.id: draw.choice(list("ABCD")) == q.answer for q in ordered if q.details["options"]}
    assert scores["accuracy"] == 100 * sum(expected.values()) / 4
    assert (scores["num_random"], scores["accuracy_without_chance"]) == (3, 0)
    assert benchmark.score(questions, Predictions(texts)) == scores
    assert benchmark.score(questions, Predictions(texts), "vlmevalkit")["num_random"] == 0
    backwards = list(reversed(questions))
    assert benchmark.correct(backwards, Predictions(texts)) == [expected.get(q.id, False) for q in backwards]


def test_mmmu_open_questions_by_dialect_and_prompts(tmp_path):
    benchmark = get_benchmark("mmmu")
    questions = benchmark.load(write_benchmark(tmp_path, "mmmu", "release"))
    texts = {q.id: "it is 3.5" if not q.details["options"] else q.answer for q in questions}
    by_dialect = {d: benchmark.score(questions, Predictions(texts), d)["accuracy"] for d in DIALECTS}
    # VLMEvalKit looks for the gold text itself, "3.50"
    assert by_dialect == {"original": 100, "lmms": 100, "vlmevalkit": 75}
    open_question = next(q for q in questions if not q.details["options"])
    assert benchmark.prompt(open_question).endswith("single word or phrase.")
    two = next(q for q in questions if len(q.images) == 2)
    assert two.text.startswith("how many objects are there ? <image 1> and <image 2>\nA. one")
    per_domain = benchmark.score(questions, Predictions(texts))["per_domain"]
    assert {k: v["num_questions"] for k, v in per_domain.items()} == {"Art and Design": 2, "Science": 2}


def test_gold_letters_beyond_the_options_are_refused(tmp_path):
    rows = [{"index": 0, "image": b"x" * 99, "question": "?", "A": "a", "B": "b", "answer": "C"}]
    put_tsv(tmp_path / "SEEDBench_IMG.tsv", rows)
    with pytest.raises(DataError, match="gold answer 'C' is none of 2 options"):
        get_benchmark("seed").load(tmp_path)
    assert LETTERS.startswith("ABCD")

"""The report's figures against ones worked out from the files alone; escaping; nothing from outside."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from dyvte.backbones import BackboneConfig, get_template
from dyvte.cli import main
from dyvte.comparison.runs import layers_by_kind
from dyvte.evaluation.generation import Pipeline
from dyvte.evaluation.runner import EvalConfig, run_policies
from dyvte.evaluation.settings import parse_policies, with_reductions
from dyvte.gates import GateConfig, GateStack, uniform_offsets
from dyvte.reporting.page import markdown_text
from dyvte.reporting.sections import read_sections
from dyvte.reporting.tables import results_table
from dyvte.tasks.base import get_benchmark
from tests.helpers.fixtures import write_mini_gqa
from tests.helpers.models import tiny_llava
from tests.helpers.world import World

LAYERS = 4
HOSTILE = (
    '<script>alert("x")</script><img src=http://evil.example/x.png> | [a](http://evil.example) **b** $x^$'
)
POLICIES = ("never", "fixed:2", "fixed:1")
KEPT = {"never": 0.75, "fixed-2": 0.5, "fixed-1": 0.25}
"""Share of the questions that each run is made to answer rightly."""


WORLD = World(gqa=(24, 8), mme=4)


@pytest.fixture(scope="module")
def world(world):
    """With runs whose answers are rewritten by a rule, so that every metric is known."""
    root = world
    model, processor = tiny_llava(LAYERS)
    pipeline = Pipeline(model, processor, get_template("chat", processor), max_new_tokens=2)
    config = GateConfig(num_layers=LAYERS, hidden_size=32, offsets=uniform_offsets(LAYERS), threshold=0.45)
    GateStack.init(config, seed=1).save_pretrained(root / "gates")
    path = root / "gqa" / "testdev_balanced_questions.json"
    entries = json.loads(path.read_text())
    entries["00000"]["question"] = HOSTILE
    entries["00003"]["types"]["detailed"] = HOSTILE
    path.write_text(json.dumps(entries))
    for name in ("gqa", "mme"):
        policies = [*POLICIES, f"gates:{root / 'gates'}"]
        settings = EvalConfig(
            model=BackboneConfig(path="tiny"),
            benchmark=name,
            data=root / name,
            output=root / "runs" / name,
            policies=tuple(policies),
            question_suffix="",
            batch_size=8,
            max_new_tokens=2,
            timing_batches=int(name == "gqa"),
            timing_repeats=1,
            timing_tokens=2,
        )
        benchmark = get_benchmark(name)
        named = parse_policies(policies) + with_reductions(parse_policies(["never"]), ["fastv:1:0.5"])
        run_policies(pipeline, benchmark, benchmark.load(root / name), named, settings)
    for name, share in KEPT.items():
        _answer_by_rule(root / "runs" / "gqa" / name, share)
    return root


def _answer_by_rule(folder, share: float) -> None:
    """Question n of 24 is answered rightly if n % 4 < 4 * share; else with markup."""
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    for n, row in enumerate(rows):
        row["prediction"] = "red" if n % 4 < 4 * share else HOSTILE
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = json.loads((folder / "scores.json").read_text())
    scores["headline"] = f"{100 * share:.1f}"
    (folder / "scores.json").write_text(json.dumps(scores))


@pytest.fixture(scope="module")
def report(world):
    output = world / "report"
    assert (
        main(["report", str(world / "runs"), "--output", str(output), "--examples", "5", "--draws", "1000"])
        == 0
    )
    return output


def _gqa(report):
    sections = json.loads((report / "report.json").read_text())
    return next(section for section in sections if section["benchmark"] == "gqa")


def _exits(world, run):
    lines = (world / "runs" / "gqa" / run / "exits.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_scores_and_agreement_are_those_of_the_answers(report):
    runs = _gqa(report)["runs"]
    for name, share in KEPT.items():
        assert runs[name]["value"] == pytest.approx(100 * share)
        against = runs[name]["against_full"]
        assert against["kept"] == pytest.approx(share / 0.75)
        assert against["difference"]["difference"] == pytest.approx(100 * (share - 0.75))
        # where the full model is right and the run is not; elsewhere both say the same
        assert against["lost"] == round(24 * (0.75 - share))
        assert against["won"] == 0
        assert against["same_answer"] == pytest.approx(1 - (0.75 - share))


def test_intervals_are_a_paired_bootstrap_over_images(report):
    """Images n % 8, three questions each, drawn anew here one by one."""
    found = _gqa(report)["runs"]["fixed-2"]["against_full"]["difference"]
    lost = np.array([-(n % 4 == 2) for n in range(24)], dtype=float)
    per_image = np.array([lost[np.arange(24) % 8 == image].sum() for image in range(8)])
    rng = np.random.default_rng(5)
    draws = [100 * per_image[rng.integers(0, 8, 8)].sum() / 24 for _ in range(20_000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found["low"] == pytest.approx(low, abs=4.2)  # one question is 4.17 points
    assert found["high"] == pytest.approx(high, abs=4.2)
    assert (found["num_images"], found["mean_b"]) == (8, 75)


def test_exit_shares_and_gate_probabilities_are_those_of_the_files(world, report):
    runs = _gqa(report)["runs"]
    name = next(name for name in runs if name.startswith("gates"))
    rows = _exits(world, name)
    shares = [sum(row["exit_layer"] == k for row in rows) / 24 for k in range(LAYERS + 1)]
    assert runs[name]["exit_shares"] == pytest.approx(shares)
    assert sum(share > 0 for share in shares) > 1
    kind = [n for n in range(24) if n % 3 == 1]
    expected = [sum(rows[n]["exit_layer"] == k for n in kind) / len(kind) for k in range(LAYERS + 1)]
    assert runs[name]["exit_shares_per_kind"]["type1"] == pytest.approx(expected)
    for k in range(LAYERS - 1):
        asked = [row["gate_logits"][k] for row in rows if row["gate_logits"][k] is not None]
        mean = np.mean([1 / (1 + np.exp(-x)) for x in asked])
        assert runs[name]["mean_gate_probability"][k] == pytest.approx(mean, abs=1e-5)
    assert runs[name]["mean_gate_probability"][LAYERS - 1] is None


def test_the_tables_of_page_and_markdown_hold_the_metrics(world, report):
    page, text = ((report / f"report.{kind}").read_text() for kind in ("html", "md"))
    compute = f"{100 * 2 / LAYERS:.1f} %"
    for line in (
        ["fixed-2", "50.0", "66.7 %"],
        ["fixed-1", "25.0", "33.3 %"],
    ):
        assert "".join(f"<td>{cell}</td>" for cell in line) in page
        assert re.search(r"\| " + r" *\| ".join(map(re.escape, line)), text)
    assert f"<td>{compute}</td>" in page
    # three digits of FLOPs in a unit that shows them
    runs = {name: json.loads((world / "runs" / "gqa" / name / "scores.json").read_text()) for name in KEPT}
    assert "<th>prefill, GFLOPs</th>" in page
    for one in runs.values():
        assert f"<td>{1000 * one['prefill']['vtw']['tflops']:.3g}</td>" in page
    # the stored times, as they are
    timing = runs["fixed-2"]["timing"]
    assert f"<td>{timing['time_to_first_token_ms']:.1f}</td>" in page


class _Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.references = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        named = ("src", "href", "srcset", "data", "action", "poster", "background")
        self.references += [value for key, value in attrs if key in named]
        assert not [key for key, _ in attrs if key.startswith("on")]


def test_the_page_is_self_contained_and_escaped(report):
    page = (report / "report.html").read_text()
    elements = _Elements()
    elements.feed(page)
    assert not {"script", "link", "iframe", "object", "a", "form"} & set(elements.tags)
    assert elements.references
    assert all(one.startswith("data:image/") for one in elements.references)
    assert "url(" not in page
    assert "@import" not in page
    assert "&lt;script&gt;alert" in page  # shown as text: question, answer and type are hostile
    assert "default-src 'none'" in page


def test_markdown_is_escaped_and_names_only_its_own_files(report):
    text = (report / "report.md").read_text()
    assert "<script" not in text
    assert "](http" not in text
    linked = re.findall(r"\]\(([^)]*)\)", text)
    assert linked
    assert all((report / one).is_file() for one in linked)
    rows = [line for line in text.splitlines() if line.startswith("|") and "fixed-2" in line]
    assert {row.count("|") - row.count("\\|") for row in rows} == {4, 5, 8, 10}
    assert markdown_text("a|b\n<i>*c*") == r"a\|b &lt;i&gt;\*c\*"


def test_examples_begin_with_the_worst(world):
    from dyvte.reporting.sections import worst_examples

    sections, _ = read_sections([world / "runs" / "gqa" / name for name in KEPT])
    examples = worst_examples(sections[0], 24)
    # the full model is right where n % 4 < 3; n % 4 == 1 is lost by fixed-1, n % 4 == 2 by both
    lost = [
        sum(n % 4 >= 4 * KEPT[name] for name in ("fixed-2", "fixed-1")) if n % 4 < 3 else 0 for n in range(24)
    ]
    assert [one.lost for one in examples] == sorted(lost, reverse=True)
    assert sorted(one.index for one in examples) == list(range(24))
    assert all(one.lost == lost[one.index] for one in examples)


def test_plots_for_papers_lie_beside_the_page(report):
    for stem in ("1-gqa-curve", "2-mme-curve"):
        assert (report / "plots" / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
        assert "<svg" in (report / "plots" / f"{stem}.svg").read_text()
    assert list((report / "plots").glob("1-gqa-gates-*-exits.pdf"))
    assert list((report / "plots").glob("1-gqa-gates-*-gates.pdf"))
    assert (report / "report.html").stat().st_size < 3e6


def test_runs_that_cannot_be_reported_are_named(world, tmp_path, capsys):
    def refused(*arguments):
        assert main(["report", *map(str, arguments), "--output", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "no run folder at" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no run of dyvte eval" in refused(tmp_path / "empty")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json").write_text("{}")
    assert "none of the runs is finished" in refused(tmp_path / "half")
    run = world / "runs" / "gqa" / "never"
    assert "expected BENCHMARK=FOLDER" in refused(run, "--data", "gqa")
    message = refused(run, "--data", f"gqa={tmp_path / 'gone'}")
    assert "is no longer at" in message
    write_mini_gqa(tmp_path / "other", questions=3)
    message = refused(run, "--data", f"gqa={tmp_path / 'other'}")
    assert "does not hold the questions" in message


def test_without_the_full_model_it_says_so_and_unfinished_runs_are_listed(world, tmp_path):
    unfinished = tmp_path / "runs" / "unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "run.json").write_text("{}")
    arguments = ["report", str(world / "runs" / "gqa" / "fixed-2"), str(tmp_path / "runs")]
    # a folder in which nothing is finished does not hide behind one that is
    assert main([*arguments, "--output", str(tmp_path / "report"), "--examples", "1"]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "No run of the full model" in page
    assert str(unfinished) in page


def test_frozen_layers_are_shown_beside_the_layers_that_read(world, tmp_path):
    model, processor = tiny_llava(LAYERS)
    pipeline = Pipeline(model, processor, get_template("chat", processor), max_new_tokens=2)
    policies = ["never", "freeze:1:3", f"oracle:{tmp_path / 'given.json'}"]
    benchmark = get_benchmark("mme")
    questions = benchmark.load(world / "mme")
    kinds = sorted({question.kind for question in questions})
    given = {q.id: [kinds.index(q.kind) % 2, 3] for q in questions}
    (tmp_path / "given.json").write_text(json.dumps(given))
    settings = EvalConfig(
        model=BackboneConfig(path="tiny"),
        benchmark="mme",
        data=world / "mme",
        output=tmp_path / "runs",
        policies=tuple(policies),
        question_suffix="",
        max_new_tokens=2,
        timing_batches=0,
    )
    results = run_policies(pipeline, benchmark, questions, parse_policies(policies), settings)
    table = results_table(results).splitlines()
    assert "layers updated / read" in table[0]
    assert "| 4.00 / 4.00 " in table[2]
    assert "| 1.00 / 3.00 " in table[3]
    output = tmp_path / "report"
    assert main(["report", str(tmp_path / "runs"), "--output", str(output), "--examples", "1"]) == 0
    runs = json.loads((output / "report.json").read_text())[0]["runs"]
    assert runs["freeze-1-3"]["mean_freeze_layer"] == 1
    assert "mean_freeze_layer" not in runs["never"]
    oracle = next(name for name in runs if name.startswith("oracle"))
    assert list(output.rglob("*oracle*states.png"))
    page = (output / "report.html").read_text()
    assert "1.00 / 3.00" in page
    assert "frozen after" in page
    by_kind = layers_by_kind(questions, [next(r.answers for r in results if r.name == oracle)])
    assert {kind: (one.updated, one.read) for kind, one in by_kind.items()} == {
        kind: (kinds.index(kind) % 2, 3) for kind in kinds
    }

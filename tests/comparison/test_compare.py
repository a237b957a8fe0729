"""The comparison: on planted scenes whose answer is known, and end to end on a tiny random model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dyvte.backbones import BackboneConfig
from dyvte.comparison.compare import compare, make_pairs
from dyvte.comparison.config import BenchmarkSource, CompareConfig
from dyvte.comparison.question_features import BagOfWords
from dyvte.comparison.records import plain
from dyvte.comparison.scenes import TracedScenes, load_scenes
from dyvte.comparison.traces import compare_on_traces
from dyvte.config import load_config
from dyvte.errors import ConfigError, DataError, ScoreError
from dyvte.gates import GateConfig, GateStack, uniform_offsets
from dyvte.objectives import expected_risk
from dyvte.reporting.comparison import comparison_markdown, write_comparison
from dyvte.reporting.comparison_plots import panels_of
from dyvte.tasks.base import ungraded
from dyvte.teacher.trace import Trace
from tests.helpers.fixtures import QUESTIONS
from tests.helpers.models import random_image
from tests.helpers.world import World

LAYERS, HIDDEN, LAM = 6, 16, 0.2
ROUTER_STEPS = 200
ROOT = Path(__file__).resolve().parents[2]


def _planted(count: int, seed: int, by_image: bool) -> TracedScenes:
    """Scenes that need a depth: decided by the image (and shown in the states), or by the wording."""
    rng = torch.Generator().manual_seed(seed)
    depths = torch.randint(1, LAYERS, (count,), generator=rng)
    layers = torch.arange(LAYERS + 1)
    risk = 3.0 * (layers < depths[:, None])
    features = 0.1 * torch.randn(count, LAYERS, 2 * HIDDEN, generator=rng)
    features[:, :, 0] += 2.0 * (layers[1:] >= depths[:, None]) - 1.0
    same = (layers >= depths[:, None]).float()
    trace = Trace(
        risk=risk,
        reverse_risk=risk,
        agreement=same,
        same_answer=same,
        loss=risk,
        features=features,
        sample_ids=tuple(f"s{n}" for n in range(count)),
        num_visual=torch.full((count,), 64),
    )
    questions = ["follow the arrow"] * count if by_image else [f"jump {d} times" for d in depths.tolist()]
    return TracedScenes(trace, tuple(questions), tuple(f"image{n // 4}" for n in range(count)))


def _trained_gates(train: TracedScenes, seed: int = 0) -> GateStack:
    config = GateConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        offsets=uniform_offsets(LAYERS),
        training={"objective": {"lam": LAM, "span": 1.0}, "epochs": 2.0, "seed": seed},
    )
    gates = GateStack.init(config, seed)
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        expected_risk(gates(train.trace.features), train.trace, lam=LAM).backward()
        optimizer.step()
    return gates


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Pairs and result where the image decides the depth (True), and where the wording does (False)."""
    # planted scenes have no backbone: both kinds of routers read words
    words = SimpleNamespace(of=lambda pipeline: BagOfWords.fit([*QUESTIONS, "jump 1 2 3 4 5 times"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dyvte.comparison.question_features.TextStates", words)
        return {kind: _planted_result(tmp_path_factory.mktemp("planted"), kind) for kind in (True, False)}


def _planted_result(folder, by_image: bool):
    train, calibration, test = (_planted(400, seed, by_image) for seed in (1, 2, 3))
    for seed in (0, 1):
        _trained_gates(train, seed).save_pretrained(folder / f"seed{seed}" / "gates")
    gates = tuple(str(folder / f"seed{seed}" / "gates") for seed in (0, 1))
    pairs = make_pairs(SimpleNamespace(gates=gates, lam=None), None, train, calibration)
    return pairs, compare_on_traces(calibration, test, pairs, num_draws=300)


def test_depth_that_the_image_decides_is_beyond_the_router(planted):
    pairs, result = planted[True]
    assert [pair.name for pair in pairs] == ["seed0", "seed1"]
    over = result.over_seeds
    assert over.at_equal_compute["gates"]["same_answer"].mean > 0.95
    assert over.gates_minus["router"]["same_answer"].low > 0
    assert over.gates_minus["fixed"]["risk"].high < 0
    assert over.over_gates["router"].mean > 1.15
    assert result.within_wording_share[f"oracle(lambda={LAM})"] == pytest.approx(1.0, abs=0.01)
    # on one wording the router is a fixed layer (or a mixture of two)
    for name in ("risk", "same_answer"):
        router, fixed = (over.at_equal_compute[rule][name].mean for rule in ("router", "fixed"))
        assert router == pytest.approx(fixed, abs=0.02)


def test_depth_that_the_wording_decides_is_the_routers_too(planted):
    _, result = planted[False]
    over = result.over_seeds
    assert over.over_gates["router"].mean == pytest.approx(1.0, abs=0.05)
    assert over.gates_minus["fixed"]["same_answer"].low > 0
    assert result.within_wording_share[f"oracle(lambda={LAM})"] == pytest.approx(0.0, abs=0.01)


def test_the_router_is_no_smaller_than_the_gates(planted):
    for pair in planted[True][0]:
        assert sum(p.numel() for p in pair.router.router.parameters()) >= pair.gates.num_parameters


def test_curves_are_the_traces_own_means(planted):
    _, result = planted[True]
    test = _planted(400, 3, True)
    curves = result.curves
    assert curves.fixed.metrics["risk"] == pytest.approx(test.trace.risk.double().mean(0).tolist())
    assert curves.fixed.compute[-1] == 1.0
    gates = curves.gates["seed0"]
    assert list(gates.compute) == sorted(gates.compute)
    # the oracle's own trade-off bounds every rule: risk + lam * compute
    for lam in (0.1, 1.0):
        best = min(r + lam * c for r, c in zip(curves.oracle.metrics["risk"], curves.oracle.compute))
        for curve in (gates, curves.router["seed0"]):
            assert all(r + lam * c >= best - 0.02 for r, c in zip(curve.metrics["risk"], curve.compute))


# --- end to end ---------------------------------------------------------------------------------------------


def _write_split(root, split: str, count: int) -> None:
    (root / "images" / split).mkdir(parents=True)
    records = []
    for n in range(count):
        name = f"{split}/{n // 2}.png"
        if n % 2 == 0:
            random_image(_image_seed(split, n)).save(root / "images" / name)
        turns = [{"from": "human", "value": f"<image>\n{QUESTIONS[n % 3]}"}, {"from": "gpt", "value": "red"}]
        records.append({"id": f"{split}_{n}", "image": name, "conversations": turns})
    (root / f"{split}.json").write_text(json.dumps(records))


def _image_seed(split: str, n: int) -> int:
    return 1000 * ("train", "calibration", "test").index(split) + n


WORLD = World(gqa=(24, 6), mme=3)


@pytest.fixture(scope="module")
def world(world):
    """With traced splits, and gates of two seeds."""
    from dyvte.backbones import load_backbone
    from dyvte.data import open_conversations, select
    from dyvte.teacher import Teacher, TeacherConfig, write_traces

    root = world
    teacher = Teacher(*load_backbone(root / "backbone"), TeacherConfig(template="chat", max_new_tokens=4))
    for split, count in (("train", 36), ("calibration", 30), ("test", 24)):
        _write_split(root, split, count)
        selection = select(open_conversations(root / f"{split}.json"))
        write_traces(root / f"trace-{split}", teacher, selection)
    for seed in (0, 1):
        config = GateConfig(
            num_layers=4,
            hidden_size=32,
            offsets=uniform_offsets(4),
            threshold=0.35,
            training={"objective": {"lam": 0.1, "span": 1.0}, "epochs": 2.0},
        )
        GateStack.init(config, seed).save_pretrained(root / f"gates-{seed}")
    return root


def _config(world, output, **changes):
    settings = CompareConfig(
        model=BackboneConfig(path=str(world / "backbone")),
        gates=(str(world / "gates-0"), str(world / "gates-1")),
        output=output,
        image_folder=world / "images",
        benchmarks=(f"mini-GQA:gqa={world / 'gqa'}", f"mme={world / 'mme'}"),
        controls=("pool:2", "divprune:0.5"),
        question_suffix="",
        template="chat",
        batch_size=16,
        max_new_tokens=4,
        timing_batches=0,
        num_draws=100,
        **{f"data_{s}": world / f"{s}.json" for s in ("train", "calibration", "test")},
        **{f"traces_{s}": world / f"trace-{s}" for s in ("train", "calibration", "test")},
    )
    return dataclasses.replace(settings, **changes)


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared")
    config = _config(world, output, budgets="0.3,0.6", baselines=(f"other={world / 'gates-1'}",))
    found = compare(config)
    write_comparison(found, output)
    return found, output


def test_baselines_spend_what_the_gates_spend(compared):
    found, _ = compared
    assert list(found.benchmarks) == ["mini-GQA", "MME"]
    for benchmark in found.benchmarks.values():
        for seed in found.gates:
            spent = {
                rule: benchmark.runs[f"{rule}-{seed}"].cost.visual_compute
                for rule in ("gates", "vtw-mixture", "router")
            }
            # whole questions are drawn, so half a question of slack
            assert spent["vtw-mixture"] == pytest.approx(spent["gates"], abs=0.51 / benchmark.num_questions)
            assert spent["router"] == pytest.approx(spent["gates"], abs=0.51 / benchmark.num_questions)


def test_controls_stand_in_the_table_and_choose_the_hard_subset(compared):
    found, output = compared
    rows = {row.policy: row for row in found.rows}
    assert rows["control pool:2"].visual_compute == pytest.approx(0.25)
    assert rows["control divprune:0.5"].visual_compute == pytest.approx(0.5)
    for benchmark in found.benchmarks.values():
        assert {"never+pool-2", "never+divprune-0.5"} <= set(benchmark.runs)
        for hard in benchmark.hard:
            assert hard.pooled == "pool:2"
            assert (hard.scores["never"].solved, hard.scores["never+pool-2"].solved) == (100, 0)
            assert set(hard.scores) == set(benchmark.runs)
    text = (output / "comparison.md").read_text()
    assert text.count("the hard subset\n") == sum(len(one.hard) for one in found.benchmarks.values())


def test_scores_are_the_benchmarks_own(compared):
    found, _ = compared
    gqa, mme = found.benchmarks.values()
    assert (gqa.num_questions, mme.num_questions) == (24, 12)
    assert (gqa.score_name, mme.score_name) == ("accuracy, %", "points, sum of subtasks")
    for name, run in gqa.runs.items():
        assert gqa.values[name] == pytest.approx(run.scores["accuracy"])
    for name, run in mme.runs.items():
        assert mme.values[name] == pytest.approx(run.scores["perception"] + run.scores["cognition"])
    for benchmark in (gqa, mme):
        gap = benchmark.gates_minus["full"]
        gates = [benchmark.values[f"gates-{seed}"] for seed in found.gates]
        assert gap.difference == pytest.approx(sum(gates) / len(gates) - benchmark.values["never"])


def test_the_table_and_its_files(compared):
    found, output = compared
    rows = {row.policy: row for row in found.rows}
    full = rows["full model"]
    assert (full.same_answer, full.mean_exit_layer, full.visual_compute) == (1.0, 4.0, 1.0)
    assert list(rows)[-3:] == [
        "VTW at the gates' budget (mixture of two K)",
        "question-only router",
        "DyVTE gates",
    ]
    assert [len(full.scores[title]) for title in ("mini-GQA", "MME")] == [1, 2]
    text = (output / "comparison.md").read_text()
    assert all(policy in text for policy in rows)
    assert "| mini-GQA " in text.splitlines()[2]
    assert "| MME (perception / cognition) " in text.splitlines()[2]
    assert "mini-MME" not in text
    for file in ("comparison.png", "comparison.svg", "comparison.json", "budgets.png", "config.yaml"):
        assert (output / file).stat().st_size > 100
    stored = json.loads((output / "comparison.json").read_text())
    assert stored["table"] == [row.to_dict() for row in found.rows]
    assert set(stored) == {"settings", "vtw", "gates", "traces", "benchmarks", "table", "budgets"}
    panels = [panel.title for panel in panels_of(found)]
    assert panels[2:] == ["mini-GQA: accuracy, %"]


def test_budgets_compare_with_further_gates_too(compared):
    found, output = compared
    assert [row.budget for row in found.budgets.rows] == [0.3, 0.6]
    assert found.budgets.baselines == ("fixed K", "question-only router", "other")
    assert len(found.budgets.curves["gates"]) == 2
    # "other" are the gates of the second seed
    assert found.budgets.curves["other"][0] == found.budgets.curves["gates"][1]
    assert "## At given budgets" in (output / "comparison.md").read_text()


def test_answers_depend_on_the_exit_layer_alone(compared):
    found, output = compared
    curves = found.benchmarks["mini-GQA"].curves
    assert found.benchmarks["MME"].curves is None
    assert set(curves.lookup_agreement.values()) == {1.0}
    for seed in found.gates:
        assert curves.rules.gates[seed].metrics["same_answer"][-1] == 1.0
    sweep = output / "runs" / "mini-gqa-sweep"
    scores = [json.loads((sweep / f"fixed-{k}" / "scores.json").read_text()) for k in range(4)]
    fixed = curves.rules.fixed.metrics
    assert fixed["same_answer"][:4] == pytest.approx([one["same_answer_as_never"] for one in scores])
    assert fixed["score"][:4] == pytest.approx([one["scores"]["accuracy"] for one in scores])


def test_again_gives_the_same_without_asking(world, compared, monkeypatch):
    found, output = compared
    monkeypatch.setattr("dyvte.evaluation.asking.answer", lambda *args: pytest.fail("asked again"))
    again = compare(_config(world, output))
    same = ("vtw", "gates", "traces", "benchmarks", "rows")
    assert [plain(getattr(again, name)) for name in same] == [plain(getattr(found, name)) for name in same]


def test_vtw_row_when_none_qualifies(compared):
    found, _ = compared
    assert len(found.vtw.kl) == 5
    below = [k for k in range(1, 4) if found.vtw.kl[k] <= 0.003]
    assert found.vtw.k == (below[0] if below else None)
    if found.vtw.k is None:
        assert any("none qualifies" in row.policy for row in found.rows)


def test_a_benchmark_without_public_answers_is_compared_by_answers(world, tmp_path, monkeypatch):
    def refuse(*args):
        raise ScoreError("no public answers")

    scores = {"benchmark": "gqa", **ungraded("no public answers")}
    monkeypatch.setattr("dyvte.tasks.gqa.GQA.correct", refuse)
    monkeypatch.setattr("dyvte.tasks.gqa.GQA.score", lambda *args: scores)
    changes = {"benchmarks": (f"gqa={world / 'gqa'}",), "gates": (str(world / "gates-0"),)}
    found = compare(_config(world, tmp_path / "out", **changes))
    benchmark = found.benchmarks["GQA"]
    assert (benchmark.gates_minus, benchmark.curves) == ({}, None)
    assert set(benchmark.values.values()) == {None}
    assert found.rows[0].scores == {}
    assert found.rows[0].same_answer == 1.0
    text = comparison_markdown(found)
    assert "not graded here" in text


def test_benchmarks_and_baselines_are_read_from_their_text_forms(world, tmp_path):
    assert BenchmarkSource.parse("gqa=/data/gqa") == BenchmarkSource("gqa", Path("/data/gqa"), "GQA")
    mini = BenchmarkSource.parse("mini GQA:gqa=a=b")
    assert (mini.title, mini.name, str(mini.root), mini.folder) == ("mini GQA", "gqa", "a=b", "mini-gqa")
    for text in ("gqa", "gqa=", "=/data", ":gqa=/data"):
        with pytest.raises(ConfigError, match=r"expected NAME=ROOT|unknown benchmark"):
            BenchmarkSource.parse(text)
    with pytest.raises(ConfigError, match="did you mean 'gqa'"):
        BenchmarkSource.parse("gqaa=/data")
    with pytest.raises(ConfigError, match="two benchmarks are called 'GQA'"):
        _config(world, tmp_path, benchmarks=("gqa=a", "gqa=b"))
    config = _config(world, tmp_path, budgets="0.5", baselines=("x=a", "y=b", "x=c"))
    assert config.baseline_gates == {"x": ("a", "c"), "y": ("b",)}
    with pytest.raises(ConfigError, match="expected NAME=FOLDER"):
        _config(world, tmp_path, budgets="0.5", baselines=("x",))
    with pytest.raises(ConfigError, match="give --budgets"):
        _config(world, tmp_path, baselines=("x=a",))


def test_paths_in_a_file_are_relative_to_it():
    config = load_config(CompareConfig, ROOT / "configs" / "compare_embedded.yaml", ["gates=[runs/gates]"])
    assert config.gates == ("runs/gates",)
    assert [(one.title, one.name) for one in config.sources] == [("mini-GQA", "gqa"), ("mini-MME", "mme")]
    assert config.sources[0].root == ROOT / "data" / "scenes" / "mini_gqa"


def test_errors(world, tmp_path):
    with pytest.raises(DataError, match="are not in"):
        load_scenes(world / "trace-test", world / "train.json", world / "images")
    with pytest.raises(ConfigError, match="no gates given"):
        _config(world, tmp_path, gates=())
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    config = GateConfig(num_layers=4, hidden_size=32, mode="fixed", fallback=2)
    (fixed / "gate_config.json").write_text(config.to_json())
    with pytest.raises(ConfigError, match="describes a fixed exit"):
        compare(_config(world, tmp_path / "out", gates=(str(fixed),)))
    bare = tmp_path / "bare"
    GateStack.init(GateConfig(num_layers=4, hidden_size=32)).save_pretrained(bare)
    with pytest.raises(ConfigError, match="does not record the lam"):
        compare(_config(world, tmp_path / "out", gates=(str(bare),)))

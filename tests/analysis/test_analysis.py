"""Studies of the papers against figures worked out one question at a time, from the stock model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dyvte.analysis import STUDIES, check_study, get_study
from dyvte.analysis.exits import shares
from dyvte.analysis.migration import blanked, blind_answers
from dyvte.data import load_image
from dyvte.errors import ConfigError, GateMismatchError
from dyvte.evaluation.run_log import read_answers
from dyvte.gates import GateConfig, GateStack, uniform_offsets
from dyvte.policies import RandomPolicy
from dyvte.reductions import RandomTokens
from dyvte.runtime import VisualExit
from tests.helpers.models import tiny_llava
from tests.helpers.subjects import LAYERS, VISUAL, greedy
from tests.helpers.subjects import alone as _alone
from tests.helpers.subjects import subject_of as _subject


def _say(world, inputs, exits=None, sample_id=None, model=None):
    model = model or world.pipeline.model
    if exits is None:
        tokens = greedy(model, inputs)
    else:
        with exits(model) as run:
            run.sample_ids = None if sample_id is None else [sample_id]
            tokens = greedy(model, inputs)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return world.pipeline.processor.tokenizer.decode(new, skip_special_tokens=True)


def _said(folder):
    """Answers of a run, in the order of the questions."""
    return [answer.prediction for answer in read_answers(folder)]


def _right(world, answers):
    """Share of right answers in percent, by the benchmark's rule on these texts."""
    from dyvte.tasks.base import Predictions

    texts = {question.id: text for question, text in zip(world.questions, answers, strict=True)}
    hits = world.benchmark.correct(world.questions, Predictions(texts))
    return 100 * sum(map(float, hits)) / len(hits)


def _agree(answers, full):
    return sum(a == b for a, b in zip(answers, full, strict=True)) / len(full)


@pytest.fixture(scope="module")
def full_answers(world):
    return [_say(world, _alone(world, question)) for question in world.questions]


# -- accuracy ----------------------------------------------------------------------------------------------


def test_migration_is_made_of_these_inputs(world, full_answers, tmp_path):
    """No image; a blank one under an exit at K; the real one under an exit at K: each by hand."""
    subject = _subject(world, tmp_path)
    found = get_study("migration")(subject).metrics
    layer = LAYERS // 2
    assert found["layer"] == layer
    fixed = VisualExit.fixed(layer)
    blank = blanked(world.questions, subject)
    pixels = _alone(world, blank[0])["pixel_values"]
    # The mean colour is zero once normalised, but for rounding to 1 of 255.
    assert pixels.abs().max() < 0.5 / 255 / min(world.pipeline.processor.image_processor.image_std) + 1e-6
    assert all(load_image(b.image).size == load_image(q.image).size for b, q in zip(blank, world.questions))
    expected = {
        "full": full_answers,
        "without_image": [_say(world, _alone(world, q, image=False)) for q in world.questions],
        "blank_image": [_say(world, _alone(world, q), fixed) for q in blank],
        "real_image": [_say(world, _alone(world, q), fixed) for q in world.questions],
    }
    assert len({tuple(answers) for answers in expected.values()}) == 4
    assert [a.prediction for a in blind_answers(subject)] == expected["without_image"]
    assert _said(tmp_path / "runs-blank" / "fixed-2") == expected["blank_image"]
    assert _said(tmp_path / "runs" / "fixed-2") == expected["real_image"]
    for name, answers in expected.items():
        assert found[name]["same_answer"] == pytest.approx(_agree(answers, full_answers)), name
        assert found[name]["correct"] == pytest.approx(_right(world, answers)), name
    assert found["without_image"]["exit_layer"] is None
    assert found["real_image"]["exit_layer"] == layer


def test_controls_and_positions_are_these_runs(world, full_answers, tmp_path):
    subject = _subject(world, tmp_path, layer=2, fastv="fastv:1:0.5")
    rows = {one["label"]: one for one in get_study("controls")(subject).metrics["rows"]}
    low, high = 1, 3
    drawn = RandomPolicy(low, high, 0)
    tokens = VisualExit(reductions=[RandomTokens(2, 0)])
    asked = [(q.id, _alone(world, q)) for q in world.questions]
    expected = {
        "full model": full_answers,
        "random tokens (K = 2)": [_say(world, inputs, tokens, id_) for id_, inputs in asked],
        "VTW, K random in 1..3": [_say(world, i, VisualExit.fixed(drawn.draw(id_))) for id_, i in asked],
        "VTW, K = 2": [_say(world, inputs, VisualExit.fixed(2)) for _, inputs in asked],
    }
    assert set(rows) == {*expected, "FastV (1:0.5)"}
    for label, answers in expected.items():
        assert rows[label]["same_answer"] == pytest.approx(_agree(answers, full_answers)), label
    runs = tmp_path / "runs"
    assert _said(runs / "never+random_tokens-2-0") == expected["random tokens (K = 2)"]
    assert _said(runs / "random-1-3-0") == expected["VTW, K random in 1..3"]
    mean_drawn = sum(drawn.draw(id_) for id_, _ in asked) / len(asked)
    assert rows["VTW, K random in 1..3"]["exit_layer"] == pytest.approx(mean_drawn)

    rearranged = VisualExit.fixed(2, positions="rearrange")
    moved = [_say(world, inputs, rearranged) for _, inputs in asked]
    rows = get_study("positions")(subject).metrics["rows"]
    assert rows["rearrange"]["same_answer"] == pytest.approx(_agree(moved, full_answers))
    assert rows["keep"]["same_answer"] == pytest.approx(_agree(expected["VTW, K = 2"], full_answers))
    assert _said(runs / "fixed-2-rearrange") == moved != expected["VTW, K = 2"]


def test_what_cannot_be_served_is_named(world, tmp_path):
    subject = _subject(world, tmp_path, fastv="fastv:9:0.5")
    found = get_study("controls")(subject)
    assert len(found.metrics["rows"]) == 4
    assert "fastv" in found.notes[0]
    assert "9" in found.notes[0]


def _kl(world, questions):
    """(L+1,) mean KL(exit || full) at the last prompt position, one run of the model for each K."""
    total = torch.zeros(LAYERS + 1, dtype=torch.float64)
    for question in questions:
        inputs = _alone(world, question)
        full = world.pipeline.model(**inputs).logits[0, -1].double().log_softmax(-1)
        for k in range(LAYERS):
            with VisualExit.fixed(k)(world.pipeline.model):
                left = world.pipeline.model(**inputs).logits[0, -1].double().log_softmax(-1)
            total[k] += (left.exp() * (left - full)).sum() / len(questions)
    return total


def test_eta_and_layers_from_one_curve(world, full_answers, tmp_path):
    plain = _subject(world, tmp_path)
    kl = _kl(world, plain.sampled)
    between = float(kl[1:LAYERS].median()) * 1.01
    subject = _subject(world, tmp_path, etas=(between, float(kl.max()) + 1, 1e-12))
    found = get_study("eta")(subject).metrics
    torch.testing.assert_close(torch.tensor(found["kl"], dtype=torch.float64), kl, atol=1e-5, rtol=1e-3)
    first = next(k for k in range(1, LAYERS) if float(kl[k]) <= between)
    assert [(row["eta"], row["k"]) for row in found["rows"]] == [
        (float(kl.max()) + 1, 1),
        (between, first),
        (1e-12, None),
    ]
    assert found["rows"][2]["outcome"] is None

    def agreement(k):
        exits = VisualExit.fixed(k)
        return _agree([_say(world, _alone(world, q), exits) for q in world.questions], full_answers)

    assert found["rows"][1]["outcome"]["same_answer"] == pytest.approx(agreement(first))
    curve = get_study("layers")(subject).metrics["curve"]
    assert [point["k"] for point in curve] == list(range(LAYERS + 1))
    assert [point["same_answer"] for point in curve] == pytest.approx(
        [agreement(k) for k in range(LAYERS + 1)]
    )
    assert curve[-1]["same_answer"] == 1
    assert curve[-1]["kl"] == 0


def test_cost_is_what_the_caches_hold(world, tmp_path):
    subject = _subject(world, tmp_path, batch_size=1, timing_batches=1, timing_repeats=1)
    found = get_study("cost")(subject).metrics["rows"]
    full, exit_row, frozen_row = (
        found[name] for name in ("full model", "VTW, K = 2", "frozen after 1, K = 2")
    )
    shape = world.pipeline.model.config.text_config
    width = 2 * 4 * shape.num_key_value_heads * shape.hidden_size // shape.num_attention_heads
    # One question a batch, so no padding: behind K the visual tokens are gone from every cache.
    saved = full["kv_bytes_per_question"] - exit_row["kv_bytes_per_question"]
    assert saved == pytest.approx(VISUAL * (LAYERS - 2) * width)
    assert full["peak_bytes_over_model"] is None
    assert full["time_to_first_token_ms"] > 0
    assert frozen_row["prefill_tflops"] < exit_row["prefill_tflops"] < full["prefill_tflops"]
    # a frozen token's key and value lie in the cache like an updated one's
    assert frozen_row["kv_bytes_per_question"] == pytest.approx(exit_row["kv_bytes_per_question"])


# -- gates -------------------------------------------------------------------------------------------------


def _gates(folder, world, seed, model=None):
    from dyvte.backbones import fingerprint, weights_digest

    model = model or world.pipeline.model
    config = GateConfig(
        num_layers=LAYERS,
        hidden_size=32,
        offsets=uniform_offsets(LAYERS),
        threshold=0.4,
        backbone={"id": "x", "fingerprint": fingerprint(model), "weights": weights_digest(model)},
    )
    GateStack.init(config, seed=seed).save_pretrained(folder)
    return str(folder)


def test_exits_and_transfer(world, full_answers, tmp_path):
    other, _ = tiny_llava(LAYERS, seed=5)
    own, foreign = _gates(tmp_path / "own", world, 1), _gates(tmp_path / "other", world, 2, other)
    subject = _subject(world, tmp_path / "out", gates=(own,))
    (found,) = get_study("exits")(subject).metrics["gates"].values()
    exits = []
    with VisualExit.from_pretrained(own)(world.pipeline.model) as run:
        for question in world.questions:
            world.pipeline.model(**_alone(world, question))
            exits.append(int(run.exit_layers[0]))
    assert found["shares"] == pytest.approx([exits.count(k) / len(exits) for k in range(LAYERS + 1)])
    for kind, own_shares in found["by_kind"].items():
        chosen = [k for k, q in zip(exits, world.questions, strict=True) if q.kind == kind]
        assert own_shares == pytest.approx(shares(chosen, LAYERS))

    both = dataclasses.replace(subject, config=dataclasses.replace(subject.config, gates=(own, foreign)))
    rows = list(get_study("transfer")(both).metrics["rows"].values())
    assert [row.get("transferred") for row in rows] == [None, False, True]
    moved = VisualExit.from_pretrained(foreign, allow_transfer=True)
    answers = [_say(world, _alone(world, q), moved) for q in world.questions]
    assert rows[2]["same_answer"] == pytest.approx(_agree(answers, full_answers))
    with pytest.raises(GateMismatchError):
        both.ask(both.policies(f"gates:{foreign}"))


@pytest.mark.full
def test_gate_inputs_share_one_trace(world, tmp_path):
    import json

    import yaml

    model, processor = tiny_llava(LAYERS)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    samples = [
        {
            "id": str(n),
            "image": f"{n % 3}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nhow many {word} ?"},
                {"from": "gpt", "value": "two"},
            ],
        }
        for n, word in enumerate(["circle", "square", "triangle", "objects"] * 4)
    ]
    (tmp_path / "train.json").write_text(json.dumps(samples))
    training = {
        "model": {"path": str(tmp_path / "model")},
        "data": {
            "path": str(tmp_path / "train.json"),
            "image_folder": str(world.root / "gqa" / "images"),
            "validation_fraction": 0.4,
        },
        "teacher": {"batch_size": 8, "max_new_tokens": 3},
        "epochs": 2,
        "batch_size": 4,
        "output_dir": "unused",
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(training))
    chosen = ("mean_visual", "mean_prompt+last_prompt")
    subject = _subject(world, tmp_path / "out", training=tmp_path / "train.yaml", feature_sets=chosen)
    rows = get_study("gate_inputs")(subject).metrics["rows"]
    assert [row["features"] for row in rows] == list(chosen)
    folder = tmp_path / "out" / "gate_inputs"
    assert len(list(folder.rglob("manifest.json"))) == 1  # one trace
    for row in rows:
        gates = folder / row["features"] / "gates"
        config = GateConfig.from_json((gates / "gate_config.json").read_text())
        assert config.features == tuple(row["features"].split("+"))
        with VisualExit.from_pretrained(gates)(world.pipeline.model) as run:
            exits = []
            for question in world.questions:
                world.pipeline.model(**_alone(world, question))
                exits.append(int(run.exit_layers[0]))
        assert row["exit_layer"] == pytest.approx(sum(exits) / len(exits))


# -- what users can get wrong ------------------------------------------------------------------------------


def test_wrong_settings_are_named(world, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'last_token'"):
        check_study("last-tokens")
    with pytest.raises(ConfigError, match="chooses its own policies"):
        _subject(world, tmp_path, policies=("never", "fixed:2"))
    with pytest.raises(ConfigError, match=r"layer 4: expected 1\.\.3"):
        get_study("migration")(_subject(world, tmp_path, layer=4))
    with pytest.raises(ConfigError, match=r"layers \[0, 7\]"):
        get_study("layers")(_subject(world, tmp_path, layers=(0, 7)))
    with pytest.raises(ConfigError, match="--gates"):
        get_study("exits")(_subject(world, tmp_path))
    with pytest.raises(ConfigError, match="--training"):
        get_study("gate_inputs")(_subject(world, tmp_path))
    with pytest.raises(ConfigError, match="timing_batches"):
        get_study("cost")(_subject(world, tmp_path))
    assert all(callable(get_study(name)) for name in STUDIES)

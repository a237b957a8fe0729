"""VTW's K: against one separate masked pass per K, in both directions."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.functional import kl_div

from dyvte.backbones import encode, get_template
from dyvte.calibration import LayerSearch, check_plot, plot_search, search_exit_layer
from dyvte.errors import CalibrationError, ConfigError, DataError
from tests.helpers.models import random_image, tiny_llava
from tests.teacher.test_teacher import ANSWERS, LAYERS, QUESTIONS, batch_of, masked_pass


@pytest.fixture(scope="module")
def backbone():
    return tiny_llava(layers=LAYERS)


def prompts_of(processor, rows):
    template = get_template("auto", processor)
    rendered = [template.render(QUESTIONS[row]) for row in rows]
    return encode(processor, rendered, [[random_image(row)] for row in rows], padding_side="left")[0]


@pytest.mark.parametrize("direction", ["exit||full", "full||exit"])
def test_curve_and_k_equal_a_search_by_whole_runs(backbone, direction: str) -> None:
    model, processor = backbone
    curve = torch.zeros(LAYERS + 1, dtype=torch.float64)
    for row in range(3):
        inputs = prompts_of(processor, [row])
        logits = [masked_pass(model, inputs, k)[0][-1].double().log_softmax(-1) for k in range(LAYERS + 1)]
        for k, one in enumerate(logits):
            target, given = (one, logits[-1]) if direction == "exit||full" else (logits[-1], one)
            curve[k] += kl_div(given, target, log_target=True, reduction="sum") / 3
    batches = [prompts_of(processor, [0, 1]), prompts_of(processor, [2])]
    eta = float(curve[3]) * 1.001
    found = search_exit_layer(model, batches, eta=eta, direction=direction)
    torch.testing.assert_close(found.kl, curve, atol=1e-5, rtol=1e-3)
    assert found.k == next(k for k in range(1, LAYERS) if curve[k] <= eta)
    assert (found.num_samples, found.k_range) == (3, (1, LAYERS - 1))
    with_answers = [batch_of(processor, [0, 1], "right"), batch_of(processor, [2], "right")]
    again = search_exit_layer(model, with_answers, eta=eta, direction=direction)
    torch.testing.assert_close(again.kl, curve, atol=1e-5, rtol=1e-3)


def test_none_qualifies_is_an_answer(backbone) -> None:
    model, processor = backbone
    found = search_exit_layer(model, [prompts_of(processor, [0])], eta=0.0)
    assert found.k is None
    assert found.kl[-1] == 0
    late = search_exit_layer(model, [prompts_of(processor, [0])], eta=0.0, k_range=(1, LAYERS))
    assert late.k == LAYERS


def test_answer_positions_give_the_risk_of_the_trace(backbone) -> None:
    from dyvte.teacher import trace_exits

    model, processor = backbone
    inputs, answer = batch_of(processor, [0, 1, 2], "left")
    found = search_exit_layer(model, [(inputs, answer)], direction="full||exit", positions="answer")
    torch.testing.assert_close(found.kl, trace_exits(model, inputs, answer).risk.double().mean(0))
    with pytest.raises(DataError, match="answer_mask"):
        search_exit_layer(model, [inputs], positions="answer")


def test_rows_without_an_image_are_left_out(backbone) -> None:
    model, processor = backbone
    template = get_template("auto", processor)
    rendered = [template.render(QUESTIONS[0]), template.render(ANSWERS[1], has_image=False)]
    mixed, _ = encode(processor, rendered, [[random_image(0)], []], padding_side="left")
    found = search_exit_layer(model, [mixed])
    alone = search_exit_layer(model, [prompts_of(processor, [0])])
    assert found.num_samples == 1
    torch.testing.assert_close(found.kl, alone.kl, atol=1e-6, rtol=1e-4)
    text, _ = encode(processor, rendered[1:], [[]], padding_side="left")
    with pytest.raises(CalibrationError, match="no sample with an image"):
        search_exit_layer(model, [text])
    with pytest.raises(CalibrationError, match="k_range"):
        search_exit_layer(model, [mixed], k_range=(1, 9))


def search(k):
    kl = torch.tensor([0.5, 0.1, 0.002, 0.001, 0.0], dtype=torch.float64)
    return LayerSearch(
        k=k, kl=kl, eta=0.003, k_range=(1, 3), direction="exit||full", positions="last_prompt", num_samples=20
    )


@pytest.mark.parametrize("k", [2, None])
def test_the_plot_shows_curve_bound_and_choice(tmp_path, k) -> None:
    plot_search(search(k), tmp_path / "kl.svg")
    text = (tmp_path / "kl.svg").read_text()
    assert text.count("<!-- eta = 0.003 -->") == 1
    assert ("<!-- K = 2 -->" in text) == (k is not None)
    assert ("none qualifies" in text) == (k is None)
    assert "<!-- mean KL(exit||full) -->" in text


@pytest.mark.parametrize(("name", "message"), [("kl.pdf", "png or .svg"), ("no/kl.png", "does not exist")])
def test_a_plot_that_cannot_be_written_is_refused_at_once(tmp_path, name, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_plot(tmp_path / name)


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch) -> None:
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"install dyvte\[eval\]"):
        check_plot(tmp_path / "kl.png")

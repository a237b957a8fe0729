"""What a reply says to be certified: of one threshold, of the question's group, or why nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dyvte.errors import DyvteError
from dyvte.gates import GateStack, GroupFinder, GroupThresholds
from dyvte.reductions import parse_reductions
from dyvte.serving.answerer import Answerer
from dyvte.serving.asking import ask
from dyvte.serving.certificates import Proofs
from dyvte.serving.errors import RequestError
from dyvte.serving.jobs import Conversation
from dyvte.serving.schedules import ScheduleWish
from dyvte.serving.terminal import layers_line
from tests.helpers.models import random_image

QUESTION = Conversation("what color is the circle ?", [[random_image(1)]])
ALPHA, DELTA = 0.03, 0.2
# group -> its threshold, what calibration found of it
GROUPS = {
    "color": (0.25, {"certified": True, "num_images": 140, "num_samples": 300, "smallest_alpha": 0.016}),
    "count": (1.0, {"certified": False, "num_images": 31, "num_samples": 40, "smallest_alpha": 0.0713}),
    "read": (1.0, {"certified": False, "num_images": 0, "num_samples": 0}),
}
RECORD = {
    "kind": "risk by group",
    "loss": "same_answer",
    "alpha": ALPHA,
    "delta": DELTA,
    "joint": False,
    "groups": [{"name": name, **found} for name, (_, found) in GROUPS.items()],
    "one_threshold": {"certified": True, "alpha": ALPHA, "delta": DELTA, "threshold": 0.4},
    "visual_compute": 0.55,
}


@pytest.fixture
def grouped(gates_folder, tmp_path):
    """Writes gates whose rows are all told to be of one group, or (None) like none."""

    def write(group: str | None, **record) -> str:
        plain = GateStack.from_pretrained(gates_folder)
        finder = GroupFinder(
            mean_F=torch.zeros(plain.config.feature_size),
            projection_FZ=torch.zeros(plain.config.feature_size, 1),  # all rows are projected to 0
            centers_GZ=torch.tensor([[0.0] if name == group else [2.0] for name in GROUPS]),
            limit=torch.tensor(1.0),
            reference_IZ=torch.zeros(1, 1),
        )
        groups = GroupThresholds(
            layer=1,
            names=tuple(GROUPS),
            thresholds=tuple(threshold for threshold, _ in GROUPS.values()),
            finder=finder.digest(),
        )
        config = replace(plain.config, threshold=0.4, groups=groups, calibration={**RECORD, **record})
        made = GateStack(config)
        made.load_state_dict(plain.state_dict())
        made.finder = finder
        made.save_pretrained(tmp_path / "grouped")
        return f"gates:{tmp_path / 'grouped'}"

    return write


def reported(pipeline, policy, **options):
    answerer = Answerer.of(pipeline, policy, **options)
    return answerer, ask(answerer, QUESTION)


def test_the_groups_own_bound_is_told(pipeline, grouped):
    answerer, answer = reported(pipeline, grouped("color"))
    report = answer.report
    assert report.certified == {
        "alpha": ALPHA,
        "delta": DELTA,
        "loss": "same_answer",
        "threshold": 0.25,
        "freeze_threshold": None,
        "group": "color",
    }
    assert (report.schedule, report.threshold, report.not_certified) == ("gates", 0.25, None)
    assert "certified: group color, mean same_answer loss <= 0.03 (delta 0.2)" in layers_line(answer)
    # That threshold decides: the same layers as where it is given for all questions.
    given = answerer.menu.choose(ScheduleWish(threshold=0.25))
    alone = ask(answerer, QUESTION, schedule=given)
    assert alone.report.exit_layer == report.exit_layer < 4
    assert alone.report.certified is None


def test_each_of_joint_bounds_has_its_part_of_delta(pipeline, grouped):
    _, answer = reported(pipeline, grouped("color", joint=True))
    assert answer.report.certified["delta"] == pytest.approx(DELTA / 3)


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ("count", "group count is not certified at 0.03 (31 images could certify 0.0713 at best)"),
        ("read", "group read is not certified at 0.03 (none of its questions was tested)"),
        (None, "the question is like none of the calibrated groups"),
    ],
)
def test_without_a_bound_the_reply_says_why(pipeline, grouped, group, said):
    _, answer = reported(pipeline, grouped(group))
    report = answer.report
    assert report.certified is None
    assert report.not_certified == f"{said}: the image stays in all layers"
    assert (report.exit_layer, report.threshold) == (4, 1.0)
    assert f"not certified: {said}" in layers_line(answer)


def test_a_bound_can_be_asked_for(pipeline, grouped):
    menu = Answerer.of(pipeline, grouped("color")).menu
    assert menu.choose(ScheduleWish(max_risk=0.05)).policy is menu.gates
    one = menu.choose(ScheduleWish(threshold=0.4))
    assert (one.text, one.certificate.alpha, one.certificate.group) == ("gates@0.4", ALPHA, None)
    with pytest.raises(
        RequestError, match=r"certified at 0\.03 by group \(loss same_answer, delta 0\.2: color\)"
    ):
        menu.choose(ScheduleWish(max_risk=0.01))
    assert menu.choose(ScheduleWish(budget=0.6)).policy is menu.gates, "what all thresholds cost together"
    with pytest.raises(RequestError, match="not calibrated"):
        menu.choose(ScheduleWish(budget=0.5))
    shown = {one["name"]: one for one in menu.groups}
    assert shown["color"]["certificate"]["alpha"] == ALPHA
    assert shown["count"]["reason"].startswith("group count is not certified")


def test_where_no_group_is_certified(pipeline, grouped):
    none = [{**one, "certified": False} for one in RECORD["groups"]]
    menu = Answerer.of(pipeline, grouped("color", groups=none, one_threshold={"certified": False})).menu
    with pytest.raises(
        RequestError, match=r"no group .* at 0\.03; their images could certify 0\.016 at best"
    ):
        menu.choose(ScheduleWish(max_risk=0.05))


def test_one_threshold_says_why_not_either(answerer):
    """Of gates with one threshold for all questions: what is certified holds at the certified ones."""
    gated = {
        t: ask(answerer, QUESTION, schedule=answerer.menu.choose(ScheduleWish(threshold=t)))
        for t in (0.3, 0.6)
    }
    assert gated[0.3].report.certified["alpha"] == 0.2
    assert gated[0.6].report.not_certified == "nothing is certified at threshold 0.6"
    plain = ask(answerer, QUESTION, schedule=answerer.menu.choose(ScheduleWish(policy="fixed:2"))).report
    assert (plain.certified, plain.not_certified) == (None, None)


def test_a_bound_does_not_outlive_other_reductions(pipeline, gates_folder):
    with pytest.warns(UserWarning, match="calibrated with reductions: none"):
        answerer = Answerer.of(pipeline, f"gates:{gates_folder}", reduction="fastv:2:0.5")
    report = ask(answerer, QUESTION).report
    assert report.certified is None
    assert "calibrated with reductions none, and are used with" in report.not_certified
    with pytest.raises(RequestError, match="of which nothing is certified"):
        answerer.menu.choose(ScheduleWish(max_risk=0.5))


def test_gates_without_a_record(answerer):
    config = replace(answerer.menu.gates.gates.config, calibration={})
    proofs = Proofs(config, parse_reductions("none"))
    assert proofs.of(answerer.menu.gates).reason == "these gates have no certificate"
    assert proofs.group_alpha is None
    assert issubclass(RequestError, DyvteError)

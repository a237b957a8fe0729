"""Which schedule a request gets, and what is said to be certified of it."""

from __future__ import annotations

import pytest

from dyvte.errors import ConfigError, GateMismatchError
from dyvte.gates import GateConfig, GateStack
from dyvte.policies import FixedPolicy, FreezePolicy, LearnedPolicy, NeverPolicy
from dyvte.serving.answerer import Answerer
from dyvte.serving.certificates import certificates_of
from dyvte.serving.errors import RequestError
from dyvte.serving.schedules import ScheduleWish


def chosen(answerer, **wish):
    return answerer.menu.choose(ScheduleWish(**wish))


def test_policies_and_thresholds(answerer):
    assert chosen(answerer) is answerer.menu.own
    assert isinstance(chosen(answerer, policy="never").policy, NeverPolicy)
    assert isinstance(chosen(answerer, policy="fixed:2").policy, FixedPolicy)
    assert isinstance(chosen(answerer, policy="freeze:1:3").policy, FreezePolicy)
    assert chosen(answerer, policy="gates").policy is answerer.menu.gates
    assert chosen(answerer, threshold=0.5).policy is answerer.menu.gates, (
        "the stored threshold: the same policy"
    )
    other = chosen(answerer, policy="gates", threshold=0.7)
    assert (other.policy.threshold, other.text) == (0.7, "gates@0.7")
    assert chosen(answerer, policy="gates", threshold=0.7) is other


def test_bounds_take_the_earliest_certified_threshold(answerer):
    assert chosen(answerer, max_risk=0.05).policy.threshold == 0.5
    assert chosen(answerer, max_risk=0.19).policy.threshold == 0.5
    loose = chosen(answerer, max_risk=0.5)
    assert (loose.policy.threshold, loose.certificate.alpha) == (0.3, 0.2)
    assert chosen(answerer, threshold=0.3).certificate == loose.certificate
    assert chosen(answerer, threshold=0.31).certificate is None
    assert chosen(answerer, policy="never").certificate is None
    with pytest.raises(RequestError, match=r"max_risk 0\.01: these gates are certified at 0\.05, 0\.2"):
        chosen(answerer, max_risk=0.01)


def test_budgets_take_the_latest_threshold_within_them(answerer):
    assert chosen(answerer, budget=0.95).policy.threshold == 0.9
    assert chosen(answerer, budget=0.65).policy.threshold == 0.5, "the calibration's own, at 0.6"
    assert chosen(answerer, budget=0.5).policy.threshold == 0.2
    assert isinstance(chosen(answerer, budget=1.0).policy, NeverPolicy)
    with pytest.raises(RequestError, match=r"calibrated to 0\.3 or more"):
        chosen(answerer, budget=0.2)


def test_what_makes_no_sense_is_refused(answerer, pipeline, gates_folder, tmp_path):
    with pytest.raises(RequestError, match="policy and budget are given"):
        ScheduleWish(policy="never", budget=0.5)
    with pytest.raises(RequestError, match="threshold are given"):
        ScheduleWish(policy="never", threshold=0.5)
    for text in ("nothing", "gates@0.5", "oracle", ""):
        with pytest.raises(RequestError, match="unknown policy") as error:
            chosen(answerer, policy=text)
        assert "FOLDER" not in str(error.value), "what only the command line takes is not offered"
        assert "gates (a threshold of theirs: visual_exit.threshold)" in str(error.value)
    with pytest.raises(ConfigError, match="names samples beforehand"):
        Answerer.of(pipeline, f"oracle:{_oracle(tmp_path)}")
    with pytest.raises(ConfigError, match="has gates already"):
        Answerer.of(pipeline, f"gates:{gates_folder}", gates_folder)
    with pytest.raises(ConfigError, match="exit layer 9"):
        Answerer.of(pipeline, "fixed:9")


def test_gates_of_another_model_are_refused_at_the_start(pipeline, tmp_path):
    config = GateConfig(num_layers=4, hidden_size=32, backbone={"id": "another", "fingerprint": "0" * 16})
    GateStack.init(config, 0).save_pretrained(tmp_path / "gates")
    with pytest.raises(GateMismatchError, match="another"):
        Answerer.of(pipeline, "never", tmp_path / "gates")
    GateStack.init(GateConfig(num_layers=5, hidden_size=32), 0).save_pretrained(tmp_path / "deeper")
    with pytest.raises(GateMismatchError, match="5 layers"):
        Answerer.of(pipeline, f"gates:{tmp_path / 'deeper'}")


def test_gates_beside_another_policy(pipeline, gates_folder):
    answerer = Answerer.of(pipeline, "fixed:2", gates_folder)
    assert isinstance(answerer.menu.own.policy, FixedPolicy)
    assert answerer.menu.own.text == "fixed:2"
    assert isinstance(chosen(answerer, policy="gates").policy, LearnedPolicy)


def test_certificates_of_what_was_not_certified():
    record = {"kind": "risk", "certified": False, "alpha": 0.01, "num_images": 40, "smallest_alpha": 0.056}
    config = GateConfig(num_layers=4, hidden_size=32, calibration={**record, "loss": "same_answer"})
    assert certificates_of(config) == ()
    assert certificates_of(GateConfig(num_layers=4, hidden_size=32)) == ()


def _oracle(folder):
    path = folder / "oracle.json"
    path.write_text('{"a": 1}')
    return path


@pytest.mark.parametrize(("bound", "said"), [(0.05, "at least 48 images"), (1e-7, "more than 100000 images")])
def test_gates_without_a_certificate_say_what_one_takes(pipeline, tmp_path, bound, said):
    GateStack.init(GateConfig(num_layers=4, hidden_size=32)).save_pretrained(tmp_path)
    with pytest.raises(
        RequestError, match=f"dyvte calibrate --alpha {bound:g} makes one where it is shown {said}"
    ):
        chosen(Answerer.of(pipeline, f"gates:{tmp_path}"), max_risk=bound)

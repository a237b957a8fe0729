"""Policies by their plans, without any model."""

import collections
import inspect
from pathlib import Path

import pytest
import torch

from dyvte.errors import ConfigError, GateMismatchError
from dyvte.gates import GateConfig, GateStack, save_config
from dyvte.policies import (
    POLICIES,
    FixedPolicy,
    FreezePolicy,
    LearnedPolicy,
    NeverPolicy,
    OraclePolicy,
    RandomPolicy,
    Rows,
    parse_policy,
)
from dyvte.policies.per_row import PerRowPolicy

ROWS = Rows(6, torch.tensor([4, 4, 0, 8]), torch.tensor([5, 1, 3, 0]), ["a", "b", "c", "d"])


def test_never_and_fixed():
    assert NeverPolicy().start(ROWS).exit_layers_B.tolist() == [6] * 4
    assert FixedPolicy(2).start(ROWS).exit_layers_B.tolist() == [2] * 4
    assert FixedPolicy(None).start(ROWS).exit_layers_B.tolist() == [6] * 4
    assert not any(FixedPolicy(2).start(ROWS).asks(k) for k in range(7))


def test_oracle_takes_a_vector_a_mapping_and_spreads_over_beams():
    assert OraclePolicy([1, 2, 3, 4]).start(ROWS).exit_layers_B.tolist() == [1, 2, 3, 4]
    assert OraclePolicy([1, 5]).start(ROWS).exit_layers_B.tolist() == [1, 1, 5, 5]
    by_id = OraclePolicy({"d": 0, "c": 1, "b": 2, "a": 3, "z": 6})
    assert by_id.start(ROWS).exit_layers_B.tolist() == [3, 2, 1, 0]
    with pytest.raises(ConfigError, match="3 exit layers for a batch of 4 rows"):
        OraclePolicy([1, 2, 3]).start(ROWS)
    with pytest.raises(ConfigError, match="'c'"):
        OraclePolicy({"a": 1, "b": 1, "d": 1}).start(ROWS)
    with pytest.raises(ConfigError, match="exit layer 7"):
        OraclePolicy([1, 7]).check(6, 8)


def test_random_depends_on_seed_and_sample_only_and_covers_its_range():
    policy = RandomPolicy(2, 4, seed=1)
    alone = [
        policy.start(Rows(6, torch.tensor([1]), torch.tensor([1]), [i])).exit_layers_B.item() for i in "abcd"
    ]
    assert policy.start(ROWS).exit_layers_B.tolist() == alone
    counts = collections.Counter(policy.draw(str(i)) for i in range(3000))
    assert set(counts) == {2, 3, 4}
    assert min(counts.values()) > 900
    assert [RandomPolicy(2, 4, seed=2).draw(str(i)) for i in range(50)] != [
        policy.draw(str(i)) for i in range(50)
    ]


def test_learned_plan_settles_rows_one_layer_at_a_time():
    gates = GateStack.init(GateConfig(num_layers=6, hidden_size=4))
    plan = LearnedPolicy(gates, threshold=0.5, min_layer=2, fallback=4).start(ROWS)
    # the row without an image and the row without a prompt never ask
    assert plan.asking_rows().tolist() == [True, True, False, False]
    assert not plan.asks(1)
    assert plan.asks(2)
    plan.step(2, torch.tensor([torch.nan, -1.0, 9.0, 9.0]))
    assert plan.exit_layers_B.tolist() == [4, 6, 6, 6]
    assert plan.num_fallbacks == 1
    plan.step(3, torch.tensor([9.0, 1.0, 9.0, 9.0]))
    assert plan.exit_layers_B.tolist() == [4, 3, 6, 6]
    assert not plan.asks(4)


def test_gates_of_another_shape_are_refused_with_both_shapes():
    policy = LearnedPolicy(GateStack.init(GateConfig(num_layers=6, hidden_size=4)))
    policy.check(6, 4)
    with pytest.raises(GateMismatchError, match=r"6 layers of hidden size 4.*8 layers of hidden size 4"):
        policy.check(8, 4)
    with pytest.raises(GateMismatchError, match=r"hidden size 4.*hidden size 5"):
        policy.check(6, 5)


def test_fixed_beyond_the_backbone_is_refused():
    FixedPolicy(6).check(6, 4)
    FixedPolicy(0).check(6, 4)
    with pytest.raises(ConfigError, match=r"exit layer 7: expected 0\.\.6"):
        FixedPolicy(7).check(6, 4)
    with pytest.raises(ConfigError, match="exit layer 9"):
        RandomPolicy(1, 9).check(6, 4)


def test_a_freeze_that_makes_no_sense_is_refused():
    for text in ("freeze:", "freeze:a", "freeze:-1", "freeze:1:2:3", "freeze:1:"):
        with pytest.raises(ConfigError, match=r"expected freeze:F\[:K\]"):
            parse_policy(text)
    with pytest.raises(ConfigError, match=r"freeze layer 3, exit layer 2.*expected a freeze layer in 0\.\.2"):
        parse_policy("freeze:3:2")
    FreezePolicy(6).check(6, 4)
    with pytest.raises(ConfigError, match=r"freeze layer 7: expected 0\.\.6"):
        FreezePolicy(7).check(6, 4)
    with pytest.raises(ConfigError, match=r"exit layer 8: expected 0\.\.6"):
        FreezePolicy(2, 8).check(6, 4)
    with pytest.raises(ConfigError, match=r"freeze layer 2, exit layer 1"):
        OraclePolicy([3, 1], [2, 2])
    with pytest.raises(ConfigError, match="one layer for each"):
        OraclePolicy([3, 1], [2])


def test_a_plan_without_freeze_layers_freezes_where_it_leaves():
    plan = FixedPolicy(3).start(ROWS)
    plan.settle(torch.tensor([True, False, False, False]), 1)
    assert plan.exit_layers_B.tolist() == plan.freeze_layers_B.tolist() == [1, 3, 3, 3]
    plan = FreezePolicy(2, 5).start(ROWS)
    plan.settle(torch.tensor([True, True, False, False]), 1)
    plan.settle(torch.tensor([False, False, True, False]), 4)
    assert plan.exit_layers_B.tolist() == [1, 1, 4, 5]
    assert plan.freeze_layers_B.tolist() == [1, 1, 2, 2]


def test_who_may_freeze():
    assert FreezePolicy(1).may_freeze
    assert FreezePolicy(1, 2).may_freeze
    assert not FreezePolicy(2, 2).may_freeze
    assert not FixedPolicy(2).may_freeze
    assert OraclePolicy([3, 2], [1, 2]).may_freeze
    assert not OraclePolicy([3, -1], [3, 0]).may_freeze


def test_parse(tmp_path):
    assert isinstance(parse_policy("never"), NeverPolicy)
    assert parse_policy("fixed:16").exit_layer == 16
    random = parse_policy("random:8-24:7")
    assert (random.low, random.high, random.seed) == (8, 24, 7)
    config = GateConfig(num_layers=3, hidden_size=4, threshold=0.7, min_layer=2, fallback=1)
    GateStack.init(config).save_pretrained(tmp_path / "g")
    learned = parse_policy(f"gates:{tmp_path / 'g'}")
    assert (learned.threshold, learned.min_layer, learned.fallback) == (0.7, 2, 1)
    save_config(GateConfig(num_layers=3, hidden_size=4, fallback=2), tmp_path / "f")
    assert parse_policy(f"gates:{tmp_path / 'f'}").exit_layer == 2
    assert parse_policy(f"gates:{tmp_path / 'g'}@0.25").threshold == 0.25
    for text, message in (("g@1.5", "probability"), ("g@x", "probability"), ("f@0.5", "fixed exit")):
        with pytest.raises(ConfigError, match=message):
            parse_policy(f"gates:{tmp_path / text}")
    (tmp_path / "o.json").write_text('{"a": 3, "b": 0}')
    assert parse_policy(f"oracle:{tmp_path / 'o.json'}").exit_layers == {"a": 3, "b": 0}
    (tmp_path / "p.json").write_text('{"a": [1, 3], "b": [0, 0]}')
    pairs = parse_policy(f"oracle:{tmp_path / 'p.json'}")
    assert (pairs.freeze_layers, pairs.exit_layers) == ({"a": 1, "b": 0}, {"a": 3, "b": 0})
    for content in ('{"a": [1]}', '{"a": [1, 2], "b": 3}', "[1]", '{"a": "1"}', '{"a": true}', "{"):
        (tmp_path / "o.json").write_text(content)
        with pytest.raises(ConfigError, match="oracle:"):
            parse_policy(f"oracle:{tmp_path / 'o.json'}")


@pytest.mark.parametrize(
    "text",
    ["", "vtw", "fixed", "fixed:x", "fixed:-1", "random:5", "random:9-3", "never:3", "oracle:none.json"],
)
def test_malformed_policies_are_refused(text):
    with pytest.raises(ConfigError):
        parse_policy(text)


def test_a_policy_is_one_short_file_and_one_row_in_the_readme():
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text(encoding="utf-8")
    table = readme.split("## Exit policies")[1].split("\n\n")[1]
    rows = [line.split("|")[2].strip().strip("`").partition(":")[0] for line in table.splitlines()[2:]]
    assert sorted(rows) == sorted(POLICIES)
    policies = [POLICIES.get(name) for name in POLICIES]
    files = [Path(inspect.getsourcefile(policy)) for policy in policies]
    assert len(set(files)) == len(POLICIES)
    assert all(len(file.read_text().splitlines()) <= 100 for file in files)
    assert all(policy.usage.partition(":")[0] == policy.name for policy in policies)


def test_gates_with_two_heads_freeze_rows_and_leave_later():
    gates = GateStack.init(GateConfig(num_layers=6, hidden_size=4, freeze_head=True))
    policy = LearnedPolicy(gates, threshold=0.5, fallback=4)
    assert policy.may_freeze
    plan = policy.start(ROWS)
    assert plan.asks(0)
    assert plan.logits(0, torch.zeros(4, 8)).shape == (2, 4)
    plan.step(0, torch.tensor([[0.0] * 4, [1.0, -1.0, 1.0, 1.0]]))
    # only rows with an image and a prompt are asked
    assert plan.freeze_layers_B.tolist() == [0, 6, 6, 6]
    assert plan.exit_layers_B.tolist() == [6] * 4
    assert plan.asking_rows().tolist() == [True, True, False, False]
    plan.step(1, torch.tensor([[-1.0, -1.0, 0.0, 0.0], [1.0, torch.nan, 0.0, 0.0]]))
    assert (plan.freeze_layers_B.tolist(), plan.exit_layers_B.tolist()) == ([0, 4, 6, 6], [6, 4, 6, 6])
    assert plan.num_fallbacks == 1
    plan.settle(torch.tensor([True, False, False, True]), 3)
    assert (plan.freeze_layers_B.tolist(), plan.exit_layers_B.tolist()) == ([0, 4, 6, 3], [3, 4, 6, 3])
    assert not plan.asks(4)


def test_plans_of_one_head_freeze_rows_where_they_leave():
    gates = GateStack.init(GateConfig(num_layers=6, hidden_size=4))
    plan = LearnedPolicy(gates).start(ROWS)
    assert not plan.asks(0)
    plan.step(2, torch.tensor([1.0, -1.0, 0.0, 0.0]))
    assert plan.freeze_layers_B.tolist() == plan.exit_layers_B.tolist() == [2, 6, 6, 6]


def test_the_freeze_threshold_keeps_its_distance_from_the_exit_threshold():
    config = GateConfig(num_layers=6, hidden_size=4, freeze_head=True, threshold=0.4, freeze_threshold=0.6)
    gates = GateStack.init(config)
    assert LearnedPolicy(gates, threshold=0.4).freeze_threshold == pytest.approx(0.6)
    assert LearnedPolicy(gates, threshold=0.5).freeze_threshold == pytest.approx(2.25 / 3.25)
    assert LearnedPolicy(gates, threshold=0.5, freeze_threshold=0.5).freeze_threshold == 0.5
    one_head = GateStack.init(GateConfig(num_layers=6, hidden_size=4))
    with pytest.raises(ConfigError, match="these have none"):
        LearnedPolicy(one_head, freeze_threshold=0.5).check(6, 4)


def test_each_row_by_its_own_policy_is_what_it_is_alone():
    gates = GateStack.init(GateConfig(num_layers=6, hidden_size=4))
    careful, early = LearnedPolicy(gates, threshold=0.9), LearnedPolicy(gates, threshold=0.2)
    rows = Rows(6, torch.tensor([4, 4, 4, 4, 0, 8]), torch.tensor([5, 5, 5, 3, 3, 0]), list("abcdef"))
    policies = [careful, FreezePolicy(1, 4), early, NeverPolicy(), careful, early]
    plan = PerRowPolicy(policies).start(rows)
    alone = [
        policy.start(
            Rows(6, rows.num_visual_B[i : i + 1], rows.num_prompt_B[i : i + 1], [rows.sample_ids[i]])
        )
        for i, policy in enumerate(policies)
    ]
    generator = torch.Generator().manual_seed(0)
    for k in range(1, 6):
        assert plan.asks(k) == any(one.asks(k) for one in alone)
        assert plan.asking_rows().tolist() == [bool(one.asking_rows()) for one in alone]
        logits_B = torch.randn(6, generator=generator)
        if plan.asks(k):
            plan.step(k, logits_B)
        for i, one in enumerate(alone):
            if one.asks(k):
                one.step(k, logits_B[i : i + 1])
        assert plan.exit_layers_B.tolist() == [one.exit_layers_B.item() for one in alone]
        assert plan.freeze_layers_B.tolist() == [one.freeze_layers_B.item() for one in alone]
    assert len(set(plan.exit_layers_B.tolist())) > 2
    settled = torch.tensor([True, True, False, False, False, False])
    plan.settle(settled, 1)
    assert plan.exit_layers_B[:2].tolist() == plan.freeze_layers_B[:2].tolist() == [1, 1]


def test_rows_of_one_batch_share_a_stack_and_are_counted():
    config = GateConfig(num_layers=6, hidden_size=4)
    with pytest.raises(ConfigError, match="one stack of gates"):
        PerRowPolicy([LearnedPolicy(GateStack.init(config)), LearnedPolicy(GateStack.init(config))])
    with pytest.raises(ConfigError, match="3 policies for a batch of 4 rows"):
        PerRowPolicy([NeverPolicy()] * 3).start(ROWS)
    beams = PerRowPolicy([FixedPolicy(1), FixedPolicy(2)]).start(ROWS)
    assert beams.exit_layers_B.tolist() == [1, 1, 2, 2]
    assert PerRowPolicy([NeverPolicy(), FreezePolicy(1)]).may_freeze
    with pytest.raises(ConfigError, match="exit layer 7"):
        PerRowPolicy([NeverPolicy(), FixedPolicy(7)]).check(6, 4)
    plan = PerRowPolicy([LearnedPolicy(GateStack.init(config)), FixedPolicy(3)]).start(ROWS)
    plan.step(1, torch.full((4,), torch.nan))
    assert plan.num_fallbacks == 2

"""The matrix: every policy with every reduction on every family, held to their rules.

`POLICY_ROWS` says what a policy decides, `REDUCTION_ROWS` how a reduction is played on the stock eager model.
Answers and logits must be those of both together, and the record must count what each layer was given. A
policy or a reduction without a row fails the first test. The normal tier runs every pair on one family, and
every policy and every reduction on every family; the whole product runs in the full tier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dyvte
from dyvte.errors import UnsupportedBackboneError
from dyvte.policies import POLICIES, parse_policy
from dyvte.reductions import REDUCTIONS
from dyvte.spans import find_spans
from tests.helpers.families import ATTENTION, FAMILIES, build
from tests.helpers.reference import frozen_by_hooks
from tests.helpers.rows import POLICY_ROWS, REDUCTION_ROWS, Decided, Row
from tests.helpers.rules import GREEDY, GRIDS, LAYERS, POOLED, hidden_by_rule, less_work

ANSWER = {**GREEDY, "max_new_tokens": 5}
NEVER = [LAYERS, -1, LAYERS]
# what a family says where visual tokens cannot see fewer of each other, or of themselves
UNPOOLED = {"llava_next": "newline", "llava_onevision": "newline", "qwen3_vl": "deepstack"}
REFUSALS = {"paligemma": "rule of their own", "gemma3": "rule of their own", "llava over mistral": "window"}


@dataclass(frozen=True)
class Case:
    """A family with a reduction: rows with one image, none and two."""

    family: str
    attention: str
    row: Row
    folder: Path
    ids: Sequence[str] = ("a", "b", "c")
    has_image: Sequence[bool] = (True, False, True)

    @property
    def built(self):
        """Model, inputs and visual ids."""
        return build(self.family, self.attention)

    @property
    def refusal(self) -> str | None:
        """Why the family refuses the reduction, if it does."""
        if self.row.less.keys() & {"radius", "active_LH"} and self.family in ATTENTION:
            return REFUSALS[self.family]
        if self.row.enter is not None and self.row.needs_grid and self.family in UNPOOLED:
            return UNPOOLED[self.family]
        known = GRIDS if self.row.enter is None else POOLED
        return "grid" if self.row.needs_grid and self.family not in known else None

    @contextmanager
    def played(self, exits: Sequence[int], freezes: Sequence[int] | None = None) -> Iterator[Any]:
        """The eager model, doing what policy and reduction are said to do; and what the rule dropped."""
        model, (_, inputs, visual_ids) = build(self.family, "eager")[0], self.built
        freezes_P = torch.tensor([LAYERS] * len(exits) if freezes is None else list(freezes))
        frozen_LP = freezes_P <= torch.arange(LAYERS)[:, None]
        frozen_LP[list(self.row.frozen)] = True
        drop = None if self.row.drop is None else self.row.drop(inputs, visual_ids, self.ids, exits)
        with ExitStack() as rules:
            # the innermost hook sees the mask first: keys are hidden after a window opened some
            rules.enter_context(less_work(model, self.family, visual_ids, **self.row.less))
            enter = None if self.row.enter is None else self.row.enter(self.family)
            held = rules.enter_context(hidden_by_rule(model, exits, visual_ids, drop, self.row.after, enter))
            rules.enter_context(frozen_by_hooks(model, frozen_LP, visual_ids))
            yield model, held

    def prompt_states(self) -> Tensor:
        """What gates read of the reduced model, before anything leaves."""
        _, inputs, visual_ids = self.built
        states: list[Tensor] = []

        def keep(module, args, kwargs):
            states.append(args[0] if args else kwargs["hidden_states"])

        with self.played(NEVER) as (model, held), torch.no_grad():
            layers = model.get_decoder().layers[1:]
            handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
            model(**inputs, use_cache=False)
        for handle in handles:
            handle.remove()
        spans = find_spans(inputs["input_ids"], visual_ids, inputs["attention_mask"])
        features = torch.zeros(len(self.ids), LAYERS, 64)
        for index, state in enumerate(states):
            is_behind = self.row.after is not None and index >= self.row.after
            read_BN = spans.prompt_BN & ~held["dropped"] if is_behind else spans.prompt_BN
            for row in (0, 2):
                read = state[row, read_BN[row]]
                others = read[:-1] if len(read) > 1 else read  # a single token is its own mean
                features[row, index] = torch.cat([others.mean(0), read[-1]])
        return features


# every pair on one family; on the others every reduction, each with another policy than on the last family
FAST = [("llava", policy, reduction) for policy in POLICY_ROWS for reduction in REDUCTION_ROWS]
FAST += [
    (family, list(POLICY_ROWS)[(number + index) % len(POLICY_ROWS)], reduction)
    for number, family in enumerate(FAMILIES)
    for index, reduction in enumerate(REDUCTION_ROWS)
    if family != "llava"
]
ALL = [(f, p, r) for f in FAMILIES for p in POLICY_ROWS for r in REDUCTION_ROWS]


def test_every_policy_and_every_reduction_has_its_row():
    assert sorted(POLICY_ROWS) == list(POLICIES)
    assert sorted(REDUCTION_ROWS.keys() - {"none", "several"}) == list(REDUCTIONS)
    for policy in POLICY_ROWS:
        assert {family for family, one, _ in FAST if one == policy} == set(FAMILIES)


@pytest.mark.parametrize(("family", "policy", "reduction"), FAST)
def test_answers_and_counts_are_those_of_the_rules(family, policy, reduction, tmp_path):
    attention = "eager" if FAST.index((family, policy, reduction)) % 3 == 2 else "sdpa"
    check(Case(family, attention, REDUCTION_ROWS[reduction], tmp_path), policy)


@pytest.mark.full
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "policy", "reduction"), ALL)
def test_answers_and_counts_are_those_of_the_rules_everywhere(family, policy, reduction, attention, tmp_path):
    check(Case(family, attention, REDUCTION_ROWS[reduction], tmp_path), policy)


def check(case: Case, policy: str) -> None:
    model, inputs, _ = case.built
    if case.refusal is not None:
        exits = dyvte.VisualExit(reductions=case.row.made())
        with pytest.raises(UnsupportedBackboneError, match=case.refusal), exits(model):
            model(**inputs)
        return
    decided = POLICY_ROWS[policy](case)
    with case.played(decided.exits, decided.freezes) as (eager, held):
        expected = eager.generate(**inputs, **ANSWER, use_cache=False)
    exits = dyvte.VisualExit.from_policy(parse_policy(decided.policy), reductions=case.row.made())
    with exits(model) as run:
        run.sample_ids = list(case.ids)
        got = model.generate(**inputs, **ANSWER)
    assert torch.equal(got.sequences, expected.sequences)
    for step, (a, b) in enumerate(zip(got.logits, expected.logits, strict=True)):
        assert (a - b).abs().max() < 1e-4, step
    assert run.exit_layers.tolist() == decided.exits
    check_counts(case, decided, run.records[0], held)


def check_counts(case: Case, decided: Decided, record: Any, held: dict[str, Tensor]) -> None:
    """Visual tokens that each layer updated, and those that it handed on as they were."""
    _, inputs, visual_ids = case.built
    visual_BN = torch.isin(inputs["input_ids"], torch.tensor(list(visual_ids)))
    exits_B = torch.tensor(decided.exits)
    freezes_B = exits_B if decided.freezes is None else torch.tensor(decided.freezes)
    for index in range(LAYERS):
        is_behind = case.row.after is not None and index >= case.row.after
        left_BN = visual_BN & ~held["dropped"] if is_behind else visual_BN
        here_B = torch.where(exits_B > index, left_BN.sum(1), 0)
        is_frozen_B = (freezes_B <= index) | (index in case.row.frozen)
        assert record.visual_tokens_BL[:, index].tolist() == torch.where(is_frozen_B, 0, here_B).tolist()
        assert record.frozen_tokens_BL[:, index].tolist() == torch.where(is_frozen_B, here_B, 0).tolist()

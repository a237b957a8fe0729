"""A new image in a later turn: earlier turns stay as they were computed, the new image has its own exits."""

from __future__ import annotations

import pytest
import torch

import dyvte
from dyvte.errors import ExitRuntimeError
from dyvte.policies import OraclePolicy
from dyvte.reductions import FastV
from tests.helpers.families import build
from tests.helpers.reference import positions_of


def oracle(exits, freezes=None):
    return dyvte.VisualExit.from_policy(OraclePolicy(exits, freezes))


def hidden_keys(model, ids_BN, visual_ids, turns, exits):
    """By hooks: layer i hides the visual keys of each turn whose exit is <= i; ``turns``: where each ends."""
    visual_BN = torch.isin(ids_BN, torch.tensor(list(visual_ids)))
    column_N = torch.arange(ids_BN.shape[1])
    handles = []
    for index, layer in enumerate(model.get_decoder().layers):
        seen_BQN = torch.ones(*ids_BN.shape, ids_BN.shape[1]).bool()
        for (start, stop), exits_B in zip(turns, exits, strict=True):
            own_BN = visual_BN & (column_N >= start) & (column_N < stop)
            gone_BN = own_BN & (torch.tensor(exits_B) <= index)[:, None]
            # what an earlier turn computed stays: it saw its image in its own layers alone, and nothing later
            seen_BQN &= ~gone_BN[:, None]

        def hook(module, args, kwargs, seen_BQN=seen_BQN):
            valid_BN = now["valid"]
            causal = column_N[: valid_BN.shape[1], None] >= column_N[: valid_BN.shape[1]]
            allowed = causal & valid_BN[:, None] & seen_BQN[:, : valid_BN.shape[1], : valid_BN.shape[1]]
            mask = torch.zeros(allowed[:, None].shape)
            lowest = torch.finfo(torch.float32).min
            return args, {**kwargs, "attention_mask": mask.masked_fill(~allowed[:, None], lowest)}

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    now: dict[str, torch.Tensor] = {}
    return handles, now


def frozen_states(model, ids_BN, visual_ids, turns, freezes):
    """By hooks: visual tokens of each turn enter every layer behind their freeze as they entered that one."""
    visual_BN = torch.isin(ids_BN, torch.tensor(list(visual_ids)))
    column_N = torch.arange(ids_BN.shape[1])
    kept = {}

    def hook(module, args, kwargs, index):
        hidden_BND = (args[0] if args else kwargs["hidden_states"]).clone()
        for turn, ((start, stop), freezes_B) in enumerate(zip(turns, freezes, strict=True)):
            for row, f in enumerate(freezes_B):
                own_N = visual_BN[row] & (column_N >= start) & (column_N < stop)
                if index == f:
                    kept[turn, row] = hidden_BND[row, own_N]
                elif 0 <= f < index:
                    hidden_BND[row, own_N] = kept[turn, row]
        if args:
            return (hidden_BND, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_BND}

    return [
        layer.register_forward_pre_hook(
            lambda *given, index=index: hook(*given, index=index), with_kwargs=True
        )
        for index, layer in enumerate(model.get_decoder().layers)
    ]


EXITS = {
    "later, deeper": ([1, -1, 3], [3, -1, 2]),
    "later, first": ([4, -1, 4], [0, -1, 1]),
    "never again": ([2, -1, 0], [4, -1, 4]),
    "both": ([0, -1, 2], [2, -1, 0]),
}
FROZEN = {
    "the later one": (([2, -1, 4], [3, -1, 4]), (None, [1, -1, 0])),
    "both": (([3, -1, 4], [4, -1, 3]), ([1, -1, 2], [2, -1, 3])),
    "the first alone": (([4, -1, 2], [1, -1, 4]), ([0, -1, 1], None)),
}


@pytest.mark.parametrize("exits", EXITS.values(), ids=EXITS.keys())
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_two_turns_with_images_equal_brute_force(family, attention, exits):
    check_two_turns(family, attention, exits, (None, None))


@pytest.mark.parametrize(("exits", "freezes"), FROZEN.values(), ids=FROZEN.keys())
@pytest.mark.parametrize(
    ("family", "attention"), [("llava", "sdpa"), ("llava", "eager"), ("internvl", "sdpa")]
)
def test_an_image_of_a_later_turn_may_freeze(family, attention, exits, freezes):
    check_two_turns(family, attention, exits, freezes)


def check_two_turns(family, attention, exits, freezes):
    model, inputs, visual_ids = build(family, attention)
    ids, valid = inputs["input_ids"], inputs["attention_mask"]
    images = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    both, both_valid = torch.cat([ids, ids], 1), torch.cat([valid, valid], 1)
    more = torch.tensor([[11], [12], [13]])
    length = ids.shape[1]

    def position(ids_BN, valid_BN):
        return positions_of(model, ids_BN, valid_BN, {})

    with torch.no_grad():
        turns = [(0, length), (length, 2 * length)]
        all_ids = torch.cat([both, more], 1)
        all_valid = torch.cat([both_valid, torch.ones_like(more)], 1)
        handles, now = hidden_keys(model, all_ids, visual_ids, turns, exits)
        states = [one or exits[turn] for turn, one in enumerate(freezes)]
        handles += frozen_states(model, all_ids, visual_ids, turns, states)
        now["valid"] = all_valid.bool()
        try:
            twice = {k: torch.cat([v, v]) for k, v in images.items()}
            # the model takes images row by row, turn by turn
            order = in_rows(len(inputs["pixel_values"]))
            twice = {k: v[order] for k, v in twice.items()}
            expected = model(
                input_ids=all_ids,
                attention_mask=all_valid,
                position_ids=position(all_ids, all_valid),
                use_cache=False,
                **twice,
            ).logits
        finally:
            for handle in handles:
                handle.remove()
        first, second = map(oracle, exits, freezes)
        with first(model):
            cache = model(**inputs, position_ids=position(ids, valid)).past_key_values
        with second(model) as run:
            out = model(
                input_ids=ids,
                attention_mask=both_valid,
                position_ids=position(both, both_valid)[:, length:],
                past_key_values=cache,
                **images,
            )
            last = model(
                input_ids=more,
                attention_mask=all_valid,
                position_ids=position(all_ids, all_valid)[:, -1:],
                past_key_values=out.past_key_values,
            ).logits
    assert run.exit_layers.tolist() == exits[1]
    assert run.freeze_layers.tolist() == (freezes[1] or exits[1])
    torch.testing.assert_close(out.logits[:, -1], expected[:, 2 * length - 1], rtol=0, atol=1e-4)
    torch.testing.assert_close(last[:, -1], expected[:, -1], rtol=0, atol=1e-4)
    assert cache.get_seq_length() == 2 * length + 1


def in_rows(count):
    """Order of the images of two equal turns, row by row: the first row holds one, the last all others."""
    return [0, count, *range(1, count), *range(count + 1, 2 * count)]


def test_what_a_later_image_cannot_have_is_refused_by_name():
    model, inputs, _ = build("llava", "sdpa")
    mask = torch.cat([inputs["attention_mask"]] * 2, 1)
    with torch.no_grad(), oracle([1, -1, 2])(model):
        cache = model(**inputs).past_key_values
    again = {**inputs, "attention_mask": mask, "past_key_values": cache}
    for exits, reason in (
        (dyvte.VisualExit(reductions=[FastV(2, 0.5)]), "reductions"),
        (dyvte.VisualExit.fixed(3, positions="rearrange"), "positions='rearrange'"),
    ):
        with torch.no_grad(), exits(model), pytest.raises(ExitRuntimeError, match=reason):
            model(**again)

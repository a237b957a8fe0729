"""What reductions are said to do, played on the stock model: eager, at full length, without a cache.

The rules decide from the eager model's own attention weights, and hide afterwards what a reduction does not
compute: keys in the masks that the model makes itself, heads and neurons by hooks on its projections. Grids
are written down by hand. Shares no code with the runtime.
"""

from __future__ import annotations

import inspect
import math
from contextlib import contextmanager

import torch

from dyvte.reductions import InactiveHeads, Neighbours, SparseFFN, TokenRows, VisualProfile
from dyvte.spans import find_spans

LAYERS = 4
NEVER = [LAYERS, -1, LAYERS]
GREEDY = {
    "max_new_tokens": 9,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@contextmanager
def hidden_by_rule(model, exits_P, visual_ids, drop=None, after=None, enter=None):
    """Inside, keys are hidden in the masks that the eager model makes itself; only without a cache.

    Visual keys of a row leave at its exit; from layer index `after` on also what ``drop(weights_BHNN,
    visual_BN, valid_BN)`` said of the prompt, with the weights of the layer before. With `after` 0 it is
    ``enter(states_BND, visual_BN)`` that says, of the prompt's states before the first layer, what leaves and
    what enters in their place. Yields what it holds.
    """
    layers, exits_P = model.get_decoder().layers, torch.as_tensor(exits_P)
    now = {}

    def look(module, args, kwargs):
        ids_BN = kwargs["input_ids"]
        now["visual"] = torch.isin(ids_BN, torch.tensor(list(visual_ids)))
        now["valid"] = kwargs.get("attention_mask", torch.ones_like(ids_BN)).bool()
        now["exits"] = exits_P.repeat_interleave(len(ids_BN) // len(exits_P))

    def decide(module, args, output):
        if "dropped" not in now:
            now["dropped"] = drop(output[1], now["visual"], now["valid"])

    def enters(module, args, kwargs):
        states = (args[0] if args else kwargs["hidden_states"]).clone()
        length = now["dropped"].shape[1] if "dropped" in now else states.shape[1]
        for row, visual_N in enumerate(now["visual"]):
            prompt = row // (len(states) // len(now["exits"])) if len(now["exits"]) else row
            found, gone_N = enter(states[row, :length], visual_N[:length], prompt)
            states[row, :length] = found
            now.setdefault("dropped", torch.zeros(len(states), length, dtype=torch.bool))[row] = gone_N
        return (states, *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}

    def hide(index):
        def hook(module, args, kwargs):
            # the first argument, the states, stays where transformers looks for it
            names = list(inspect.signature(module.forward).parameters)
            kwargs = {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
            gone_BN = now["visual"] & (now["exits"] <= index)[:, None]
            if after is not None and index >= after:
                length = now["dropped"].shape[1]
                repeat = len(gone_BN) // len(now["dropped"])
                gone_BN[:, :length] |= now["dropped"].repeat_interleave(repeat, 0)
            mask = kwargs["attention_mask"]
            kwargs["attention_mask"] = mask.masked_fill(gone_BN[:, None, None], torch.finfo(mask.dtype).min)
            return args[:1], kwargs

        return hook

    handles = [model.register_forward_pre_hook(look, with_kwargs=True)]
    if enter is not None:
        handles.append(layers[0].register_forward_pre_hook(enters, with_kwargs=True))
    elif after is not None:
        handles.append(layers[after - 1].self_attn.register_forward_hook(decide))
    handles += [layer.register_forward_pre_hook(hide(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield now
    finally:
        for handle in handles:
            handle.remove()


def fastv_rule(ratio):
    """Visual tokens outside the top floor((1 - R) n) by the last row of the mean over heads."""

    def drop(weights_BHNN, visual_BN, valid_BN):
        dropped_BN = torch.zeros_like(visual_BN)
        for row, visual_N in enumerate(visual_BN):
            last = int(valid_BN[row].nonzero().max())
            columns = visual_N.nonzero().flatten()
            score = weights_BHNN[row].mean(0)[last, columns]
            keep = math.floor(round((1 - ratio) * len(columns), 9))
            dropped_BN[row, columns] = True
            # a sliding layer sees none of the far tokens: of equals the earlier ones stay
            best = score.argsort(descending=True, stable=True)[:keep]
            dropped_BN[row, columns[best]] = False
        return dropped_BN

    return drop


def draws(reduction, inputs, visual_ids, ids):
    spans = find_spans(inputs["input_ids"], visual_ids, inputs["attention_mask"])
    plan = reduction.start(TokenRows(LAYERS, spans, ids))
    return spans, plan.keep(reduction.layer, spans.valid_BN, None)


# Height and width of every image's (or tile's) tokens: of the row with one image, of the row with two.
GRIDS = {
    "llava": ([(4, 4)], [(4, 4), (4, 4)]),
    "llava_next": ([(4, 4), (4, 5)], [(4, 4), (4, 5), (4, 4), (4, 9)]),
    "internvl": ([(2, 2)], [(2, 2)] * 4),
    "idefics3": ([(2, 2)], [(2, 2)] * 4),
    "smolvlm": ([(2, 2)], [(2, 2)] * 4),
    "mistral3": ([(2, 2)], [(2, 1), (2, 2)]),
    "qwen2_vl": ([(2, 2)], [(2, 2), (2, 4)]),
    "qwen2_5_vl": ([(2, 2)], [(2, 2), (2, 4)]),
    "qwen3_vl": ([(2, 2)], [(2, 2), (2, 4)]),
}
# Of families whose visual tokens cannot see fewer of each other, but can be pooled.
POOLED = GRIDS | {
    "paligemma": ([(4, 4)], [(4, 4), (4, 4)]),
    "gemma3": ([(2, 2)], [(2, 2), (2, 2)]),
    "llava over mistral": ([(4, 4)], [(4, 4), (4, 4)]),
}
HEADS = 4


def keeps_farthest(ratio):
    """DivPrune's rule, by loops over pairs of visual tokens in fp64."""

    def enter(states_ND, visual_N, prompt):
        columns = visual_N.nonzero().flatten().tolist()
        wanted, chosen = round(len(columns) * (1 - ratio)), []

        def far(a, b):
            u, v = states_ND[a].double(), states_ND[b].double()
            return float(1 - u @ v / (u.norm() * v.norm()))

        while len(chosen) < min(wanted, len(columns)):
            others = [c for c in columns if c not in chosen]
            near = {c: min(far(c, o) for o in (chosen or columns) if o != c) for c in others}
            chosen.append(max(others, key=lambda c: near[c]))
        gone_N = visual_N.clone()
        gone_N[chosen] = False
        return states_ND, gone_N

    return enter


def averages_windows(family, side):
    """Pooling, by loops over the images' rows and columns."""

    def enter(states_ND, visual_N, prompt):
        states_ND, gone_N = states_ND.clone(), visual_N.clone()
        at = iter(visual_N.nonzero().flatten().tolist())
        for height, width in POOLED[family][1 if prompt == 2 else 0] if visual_N.any() else ():
            grid = [[next(at) for _ in range(width)] for _ in range(height)]
            for y in range(0, height, side):
                for x in range(0, width, side):
                    window = [c for line in grid[y : y + side] for c in line[x : x + side]]
                    states_ND[window[0]] = states_ND[window].clone().double().mean(0).float()
                    gone_N[window[0]] = False
        return states_ND, gone_N

    return enter


def cells(family, visual_BN):
    """(image, y, x) of every visual token of each row, in order."""
    rows = [[], [], []]
    for row, blocks in ((0, GRIDS[family][0]), (2, GRIDS[family][1])):
        for image, (height, width) in enumerate(blocks):
            rows[row] += [(image, y, x) for y in range(height) for x in range(width)]
        assert len(rows[row]) == int(visual_BN[row].sum())
    return rows


def near(family, visual_BN, radius, causal):
    """(B, N, N) bool: pairs of visual tokens that may not see each other."""
    barred = torch.zeros(*visual_BN.shape, visual_BN.shape[1], dtype=torch.bool)
    opened = torch.zeros_like(barred)
    for row, places in enumerate(cells(family, visual_BN)):
        at = visual_BN[row].nonzero().flatten().tolist()
        for i, (a, y, x) in zip(at, places, strict=True):
            for j, (b, v, u) in zip(at, places, strict=True):
                together = a == b and abs(y - v) <= radius and abs(x - u) <= radius
                if together and (j <= i or not causal):
                    opened[row, i, j] = True
                else:
                    barred[row, i, j] = True
    return barred, opened


@contextmanager
def less_work(model, family, visual_ids, *, radius=None, causal=False, active_LH=None, neurons=None):
    """Inside, visual tokens get less of every layer; the model is eager and has no cache."""
    layers, now = model.get_decoder().layers, {}

    def look(module, args, kwargs):
        visual_BN = torch.isin(kwargs["input_ids"], torch.tensor(list(visual_ids)))
        now["visual"] = visual_BN
        if radius is not None:
            now["barred"], now["opened"] = near(family, visual_BN, radius, causal)

    def mask(module, args, kwargs):
        names = list(inspect.signature(module.forward).parameters)
        kwargs = {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
        lowest = torch.finfo(torch.float32).min
        given = kwargs["attention_mask"].masked_fill(now["barred"][:, None], lowest)
        kwargs["attention_mask"] = given.masked_fill(now["opened"][:, None], 0.0)
        return args[:1], kwargs

    def zero_heads(active_H):
        def hook(module, args):
            size = args[0].shape[-1] // HEADS
            hidden = (~active_H).repeat_interleave(size)
            return (args[0].masked_fill(now["visual"][..., None] & hidden, 0.0),)

        return hook

    def zero_neurons(kept):
        def hook(module, args):
            hidden = torch.ones(args[0].shape[-1], dtype=torch.bool)
            hidden[kept] = False
            return (args[0].masked_fill(now["visual"][..., None] & hidden, 0.0),)

        return hook

    handles = [model.register_forward_pre_hook(look, with_kwargs=True)]
    for index, layer in enumerate(layers):
        if radius is not None:
            handles.append(layer.register_forward_pre_hook(mask, with_kwargs=True))
        if active_LH is not None:
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(zero_heads(active_LH[index])))
        if neurons is not None:
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(zero_neurons(neurons[index])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


ACTIVE = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
IMPORTANCE = torch.rand(LAYERS, 64, generator=torch.Generator().manual_seed(3))
PROFILE = VisualProfile(rho_SLH=torch.zeros(1, LAYERS, HEADS), importance_LM=IMPORTANCE)
TOP = [IMPORTANCE[i].topk(19).indices for i in range(LAYERS)]
# name: (reductions, what the reference omits)
CASES = {
    "radius 1": ([Neighbours(1)], {"radius": 1}),
    "radius 1, causal": ([Neighbours(1, causal=True)], {"radius": 1, "causal": True}),
    "radius 0": ([Neighbours(0)], {"radius": 0}),
    "heads": ([InactiveHeads(ACTIVE)], {"active_LH": ACTIVE}),
    "first neurons": ([SparseFFN(0.5)], {"neurons": [slice(32)] * LAYERS}),
    "best neurons": ([SparseFFN(0.3, PROFILE)], {"neurons": TOP}),
    "no neurons": ([SparseFFN(0.0)], {"neurons": [slice(0)] * LAYERS}),
    "all three": (
        [Neighbours(1), InactiveHeads(ACTIVE), SparseFFN(0.5)],
        {"radius": 1, "active_LH": ACTIVE, "neurons": [slice(32)] * LAYERS},
    ),
}

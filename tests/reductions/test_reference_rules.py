"""The published rules of DyVTE, VTW and FastV, by hand on the model's own layers, against `VisualExit`.

Batch 1, no cache, rows removed for good from the tensors. Shapes: N tokens, D hidden size, L layers.
"""

import pytest
import torch

import dyvte
from dyvte.gates import GateStack
from dyvte.reductions import FastV
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch
from tests.helpers.models import tiny_llava
from tests.helpers.reference import greedy_cached

LAYERS, HIDDEN, STEPS = 6, 32, 8
PROMPTS = [question for question in QUESTIONS if question[1]]


@pytest.fixture(scope="module")
def llava():
    return tiny_llava(layers=LAYERS)


def router(seed):
    """A state dict as the DyVTE reference code saves it; index i is the gate after the layer of index i."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for i in range(LAYERS):
        # Features of the random model are far from centred: w2 is, so that either logit may win.
        w2 = torch.randn(2, 2048, generator=generator) / 2048**0.5
        state[f"model.visual_gates_router.{i}.w2.weight"] = w2 - w2.mean(1, keepdim=True)
        w1 = torch.randn(2048, 2 * HIDDEN, generator=generator) / (2 * HIDDEN) ** 0.5
        state[f"model.visual_gates_router.{i}.w1.weight"] = w1
    return state


def embedded(model, ids_N, pixels):
    """States that enter the first layer, visual features in place."""
    out = model(input_ids=ids_N[None], pixel_values=pixels, output_hidden_states=True, use_cache=False)
    return out.hidden_states[0]


def run_layer(model, index, hidden_1ND, positions_N):
    decoder = model.get_decoder()
    n = hidden_1ND.shape[1]
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
    return decoder.layers[index](
        hidden_1ND,
        attention_mask=mask,
        position_ids=positions_N[None],
        position_embeddings=decoder.rotary_emb(hidden_1ND, positions_N[None]),
    )


def last_logits(model, hidden_1ND):
    return model.lm_head(model.get_decoder().norm(hidden_1ND))[0, -1]


def dyvte_prefill(model, state, ids_N, pixels):
    """Gate after every layer i while the image is there; exit if logit[0] < logit[1]. (exit layer, logits)"""
    hidden, positions_N = embedded(model, ids_N, pixels), torch.arange(len(ids_N))
    visual_N = ids_N == VISUAL_ID
    exit_layer, gate_logits = LAYERS, []
    for i in range(LAYERS):
        hidden = run_layer(model, i, hidden, positions_N)
        if not visual_N.any():
            continue
        after = int(visual_N.nonzero().max()) + 1
        x = torch.cat([hidden[0, after:-1].mean(0), hidden[0, -1]])
        w1, w2 = (state[f"model.visual_gates_router.{i}.{w}.weight"] for w in ("w1", "w2"))
        logit = w2 @ torch.nn.functional.gelu(w1 @ x)
        gate_logits.append(logit)
        if logit[0] < logit[1]:
            exit_layer = i + 1
            hidden, positions_N = hidden[:, ~visual_N], positions_N[~visual_N]
            visual_N = visual_N[~visual_N]
    return exit_layer, gate_logits, last_logits(model, hidden)


def vtw_forward(model, k, ids_N, pixels):
    """At the input of layer K the visual rows leave; position ids stay."""
    hidden, positions_N = embedded(model, ids_N, pixels), torch.arange(len(ids_N))
    for i in range(LAYERS):
        if i == k:
            text_N = ids_N != VISUAL_ID
            hidden, positions_N = hidden[:, text_N], positions_N[text_N]
        hidden = run_layer(model, i, hidden, positions_N)
    return last_logits(model, hidden)


def continued(model, k, ids_N, pixels, tokens):
    """Logits after each further token: gates run in the prefill only, so the exit layer stays."""
    rows = []
    for count in range(len(tokens) + 1):
        rows.append(vtw_forward(model, k, torch.cat([ids_N, tokens[:count]]), pixels))
    return torch.stack(rows)


@torch.no_grad()
def test_dyvte_rule_decides_and_answers_alike(llava):
    model, processor = llava
    seen = set()
    for seed in range(4):
        state = router(seed)
        exits = dyvte.VisualExit(GateStack.from_reference(state))
        for prompt in PROMPTS:
            inputs = batch(processor, [prompt])
            ids_N, pixels = inputs["input_ids"][0], inputs["pixel_values"]
            exit_layer, gate_logits, logits = dyvte_prefill(model, state, ids_N, pixels)
            with exits(model) as run:
                got, tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], STEPS)
            assert run.exit_layers.tolist() == [exit_layer]
            seen.add(exit_layer)
            asked = min(exit_layer, LAYERS - 1)
            expected = torch.stack([one[1] - one[0] for one in gate_logits[:asked]])
            torch.testing.assert_close(run.gate_logits[0, :asked], expected, rtol=0, atol=1e-5)
            assert torch.isnan(run.gate_logits[0, asked:]).all()
            torch.testing.assert_close(got[0, 0], logits, rtol=0, atol=1e-4)
            if seed == 0:
                steps = continued(model, exit_layer, ids_N, pixels, tokens[0, :-1])
                torch.testing.assert_close(got[0], steps, rtol=0, atol=1e-4)
    assert len(seen) >= 4, seen


@torch.no_grad()
@pytest.mark.parametrize("k", range(LAYERS + 1))
def test_vtw_rule_answers_alike(llava, k):
    model, processor = llava
    for prompt in PROMPTS[:2] + PROMPTS[-1:]:
        inputs = batch(processor, [prompt])
        ids_N, pixels = inputs["input_ids"][0], inputs["pixel_values"]
        with dyvte.VisualExit.fixed(k)(model) as run:
            got, tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], STEPS)
        assert run.exit_layers.tolist() == [k]
        expected = continued(model, k, ids_N, pixels, tokens[0, :-1])
        torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-4)


def fastv_forward(model, k, ratio, ids_N, pixels, num_prompt):
    """After layer K the visual rows that the last prompt row attends to least leave; position ids stay."""
    hidden, positions_N = embedded(model, ids_N, pixels), torch.arange(len(ids_N))
    for i in range(LAYERS):
        if i == k - 1:
            seen = {}
            attention = model.get_decoder().layers[i].self_attn
            with_weights = attention.register_forward_hook(lambda *call: seen.update(weights=call[-1][1]))  # noqa: B023
            run_layer(model, i, hidden, positions_N)
            with_weights.remove()
            score_N = seen["weights"][0].mean(0)[num_prompt - 1]
            visual = (ids_N == VISUAL_ID).nonzero().flatten()
            kept = visual[score_N[visual].topk(int(len(visual) * (1 - ratio))).indices]
            stays_N = ids_N != VISUAL_ID
            stays_N[kept] = True
        hidden = run_layer(model, i, hidden, positions_N)
        if i == k - 1:
            hidden, positions_N = hidden[:, stays_N], positions_N[stays_N]
    return last_logits(model, hidden)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("k", "ratio"), [(1, 0.5), (2, 0.5), (3, 0.75)])
def test_fastv_rule_answers_alike(k, ratio, attention):
    eager, processor = tiny_llava(layers=LAYERS, attn_implementation="eager")
    model, _ = tiny_llava(layers=LAYERS, attn_implementation=attention)
    for prompt in PROMPTS:
        inputs = batch(processor, [prompt])
        ids_N, pixels = inputs["input_ids"][0], inputs["pixel_values"]
        with dyvte.VisualExit(reductions=[FastV(k, ratio)])(model):
            got, tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 3)
        for step in range(4):
            ids_so_far = torch.cat([ids_N, tokens[0, :step]])
            expected = fastv_forward(eager, k, ratio, ids_so_far, pixels, len(ids_N))
            torch.testing.assert_close(got[0, step], expected, rtol=0, atol=1e-4)

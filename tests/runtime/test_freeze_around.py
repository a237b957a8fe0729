"""Frozen visual tokens among the things people do with a model, and the tools they put around it."""

import copy

import pytest
import torch

import dyvte
from dyvte.policies import OraclePolicy, Plan, Policy
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.reference import exit_by_masks, frozen_by_hooks, greedy_cached, greedy_reference
from tests.runtime.test_around import gradients, with_lora
from tests.runtime.test_generate import STRATEGIES
from tests.runtime.test_positions import renumbered

# Rows in all three states, in several layers at once; the fifth has no image.
FREEZES, EXITS = [0, 1, 2, 4, 0, 1], [2, 4, 3, 4, -1, 3]
# peft asks for it
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def schedule(freezes=FREEZES, exits=EXITS, **options):
    return dyvte.VisualExit.from_policy(OraclePolicy(exits, freezes), **options)


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_generate_equals_brute_force(options):
    model, processor = llava()
    inputs = batch(processor)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, **options}
    with exit_by_masks(model, EXITS, [VISUAL_ID]), frozen_by_hooks(model, FREEZES, [VISUAL_ID]):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options, use_cache=False)
    with schedule()(model) as run:
        torch.manual_seed(0)
        got = model.generate(**inputs, **options)
    assert torch.equal(got, expected)
    expansion = options.get("num_beams", options.get("num_return_sequences", 1))
    shown = [min(f, k) if k >= 0 else -1 for f, k in zip(FREEZES, EXITS, strict=True)]
    assert run.freeze_layers.tolist() == [f for f in shown for _ in range(expansion)]


@pytest.mark.parametrize(("freezes", "exits"), [([1, 0], [4, 4]), ([0, 2], [4, 3]), ([0, 4], [2, 4])])
def test_a_second_text_turn_on_the_same_cache(freezes, exits):
    model, processor = llava()
    inputs = batch(processor, (QUESTIONS[0], QUESTIONS[5]))
    more = processor.tokenizer("user what shape is it ? assistant", return_tensors="pt").input_ids
    more = more.expand(2, -1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    def second_turn(first, **further):
        ids = torch.cat([first, more], 1)
        added = torch.ones_like(ids[:, inputs["input_ids"].shape[1] :])
        mask = torch.cat([inputs["attention_mask"], added], 1)
        return model.generate(input_ids=ids, attention_mask=mask, **options, **further)

    with exit_by_masks(model, exits, [VISUAL_ID]), frozen_by_hooks(model, freezes, [VISUAL_ID]):
        first = model.generate(**inputs, **options, use_cache=False)
        expected = second_turn(first, use_cache=False, pixel_values=inputs["pixel_values"])
    with schedule(freezes, exits)(model) as run:
        out = model.generate(**inputs, **options, return_dict_in_generate=True)
        got = second_turn(out.sequences, past_key_values=out.past_key_values)
    assert torch.equal(out.sequences, first)
    assert torch.equal(got, expected)
    assert len(run.records) == 1


@pytest.mark.parametrize(("f", "k"), [(0, 4), (1, 3), (2, 4)])
def test_prompt_lookup_equals_greedy(f, k):
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[3:4])
    options = {"max_new_tokens": 20, "do_sample": False}
    with dyvte.VisualExit.fixed(k, freeze_layer=f)(model):
        greedy = model.generate(**inputs, **options)
        lookup = model.generate(**inputs, **options, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    assert torch.equal(greedy, lookup)


def test_positions_closed_up_behind_the_exit():
    model, processor = llava()
    inputs = batch(processor)
    with renumbered(model, EXITS, [VISUAL_ID]):
        expected, tokens = greedy_reference(model, inputs, EXITS, [VISUAL_ID], 8, freezes_B=FREEZES)
    with schedule(positions="rearrange")(model):
        got, got_tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 8)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert torch.equal(got_tokens, tokens)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_deep_model(side):
    model, processor = llava(layers=12)
    questions = [QUESTIONS[0], QUESTIONS[3], QUESTIONS[1], QUESTIONS[4], QUESTIONS[5]]
    inputs = batch(processor, questions, padding_side=side)
    freezes, exits = [2, 0, 5, 0, 3], [5, 9, 12, -1, 12]
    expected, tokens = greedy_reference(model, inputs, exits, [VISUAL_ID], 8, freezes_B=freezes)
    with schedule(freezes, exits)(model):
        got, got_tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 8)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert torch.equal(got_tokens, tokens)


def test_a_lora_backbone_equals_the_merged_model():
    # adapters on q, v and down: those on v are part of a frozen token's values
    wrapped, processor = with_lora()
    inputs = batch(processor)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    expected, tokens = greedy_reference(merged, inputs, EXITS, [VISUAL_ID], 4, freezes_B=FREEZES)
    with schedule()(wrapped):
        got, got_tokens, _ = greedy_cached(wrapped.get_base_model(), inputs, [VISUAL_ID], 4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert torch.equal(got_tokens, tokens)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_lora_gradients_equal_brute_force(checkpointing, use_cache):
    wrapped, processor = with_lora()
    inputs, base = batch(processor), wrapped.get_base_model()
    with exit_by_masks(base, EXITS, [VISUAL_ID]), frozen_by_hooks(base, FREEZES, [VISUAL_ID]):
        expected = gradients(wrapped, inputs, use_cache=False)
    if checkpointing is not None:
        base.activation_checkpointing_enable({"use_reentrant": checkpointing})
        if checkpointing:  # re-entrant checkpoints ask for an input with a gradient
            base.enable_input_require_grads()
        wrapped.train()
    with schedule()(wrapped) as run:
        got = gradients(wrapped, inputs, use_cache=use_cache)
    assert run.exit_layers.tolist() == EXITS
    assert max(value.abs().max() for value in expected.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5, msg=name)
    if checkpointing is not None:
        assert all(layer.gradient_checkpointing for layer in base.get_decoder().layers)


@pytest.mark.parametrize("first", ["hooks", "block"])
def test_offloaded_weights(first):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    stock, processor = llava()
    inputs = batch(processor)
    with schedule()(stock):
        expected, tokens, _ = greedy_cached(stock, inputs, [VISUAL_ID], 4)
    model = copy.deepcopy(stock)
    if first == "hooks":
        cpu_offload(model, execution_device=torch.device("cpu"))
        with schedule()(model):
            got, got_tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 4)
    else:
        with schedule()(model):
            cpu_offload(model, execution_device=torch.device("cpu"))
            got, got_tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 4)
            remove_hook_from_submodules(model)
    assert torch.equal(got, expected)
    assert torch.equal(got_tokens, tokens)


def test_bfloat16_is_as_close_to_brute_force_as_brute_force_is_to_float32():
    model, processor = llava()
    inputs = batch(processor)
    half = copy.deepcopy(model).to(torch.bfloat16)
    short = {**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
    exact, _ = greedy_reference(model, inputs, EXITS, [VISUAL_ID], 0, freezes_B=FREEZES)
    rounded, _ = greedy_reference(half, short, EXITS, [VISUAL_ID], 0, freezes_B=FREEZES)
    with schedule()(half):
        got, _, _ = greedy_cached(half, short, [VISUAL_ID], 0)
    assert (got.float() - exact).abs().max() <= 2 * (rounded.float() - exact).abs().max()


def test_nothing_is_left_on_the_model_after_an_error():
    model, processor = llava()
    layer = model.get_decoder().layers[2]
    config = layer.self_attn.config

    def fail(*_):
        raise KeyError("inside a layer")

    handle = layer.self_attn.v_proj.register_forward_pre_hook(fail)
    try:
        with pytest.raises(KeyError), schedule()(model):
            model(**batch(processor))
    finally:
        handle.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    assert layer.self_attn.config is config


class Asked(Plan):
    """Freezes and leaves by a table of logits, and writes down what it was asked."""

    features = ("mean_prompt", "last_prompt")

    def __init__(self, rows, freeze_logits_BL, exit_logits_BL):
        super().__init__(
            torch.full((len(rows.num_visual_B),), rows.num_layers),
            torch.full((len(rows.num_visual_B),), rows.num_layers),
        )
        self.num_layers, self.asked, self.seen = rows.num_layers, [], {}
        self.freeze_logits_BL, self.exit_logits_BL = freeze_logits_BL, exit_logits_BL
        self.open_B = (rows.num_visual_B > 0).clone()

    def asks(self, k):
        return k < self.num_layers and bool(self.open_B.any())

    def asking_rows(self):
        return self.open_B.clone()

    def logits(self, k, features_BF):
        self.asked.append(k)
        self.seen[k] = features_BF
        return torch.stack([self.exit_logits_BL[:, k], self.freeze_logits_BL[:, k]])

    def step(self, k, logits):
        exit_B, freeze_B = logits
        if k > 0:
            self.exit_layers_B[self.open_B & (exit_B > 0)] = k
        self.freeze_layers_B[self.open_B & (freeze_B > 0) & (self.freeze_layers_B > k)] = k
        self.open_B &= self.exit_layers_B > k


class AskedPolicy(Policy):
    may_freeze = True

    def __init__(self, *tables):
        self.tables = tables

    def start(self, rows):
        self.plan = Asked(rows, *self.tables)
        return self.plan


def test_a_plan_with_two_heads_is_asked_from_the_embeddings_on():
    model, processor = llava()
    inputs = batch(processor)
    freezes, exits = [0, 1, 3, 4, -1, 2], [2, 4, 3, 4, -1, 3]
    freeze_logits_BL = torch.full((6, 4), -1.0)
    exit_logits_BL = torch.full((6, 4), -2.0)
    for row, (f, k) in enumerate(zip(freezes, exits, strict=True)):
        if 0 <= f < 4:
            freeze_logits_BL[row, f] = 1.0 + row
        if 0 <= k < 4:
            exit_logits_BL[row, k] = 2.0 + row
    expected, tokens = greedy_reference(model, inputs, exits, [VISUAL_ID], 4, freezes_B=freezes)
    policy = AskedPolicy(freeze_logits_BL, exit_logits_BL)
    with dyvte.VisualExit.from_policy(policy)(model) as run:
        got, got_tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert torch.equal(got_tokens, tokens)
    assert policy.plan.asked == [0, 1, 2, 3]
    assert run.exit_layers.tolist() == exits
    assert run.freeze_layers.tolist() == freezes
    # asked about freezing until frozen or gone, about leaving until gone, and never without an image
    record = run.records[0]
    for row, (f, k) in enumerate(zip(freezes, exits, strict=True)):
        asked = [j for j in range(4) if f >= 0 and j <= f and (j == 0 or j <= k)]
        assert (~record.freeze_logits_BL[row].isnan()).nonzero().flatten().tolist() == asked
        assert torch.equal(record.freeze_logits_BL[row, asked], freeze_logits_BL[row, asked])
        left = [j for j in range(1, 4) if j <= k]
        assert (~record.gate_logits_BL[row].isnan()).nonzero().flatten().tolist() == [j - 1 for j in left]
        assert torch.equal(record.gate_logits_BL[row, [j - 1 for j in left]], exit_logits_BL[row, left])
    # features before the first layer are the text's embeddings
    ids, prompt = inputs["input_ids"], dyvte.spans.find_spans(inputs["input_ids"], [VISUAL_ID]).prompt_BN
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(policy.plan.seen[0][0, 32:], embedded[0, prompt[0]][-1])

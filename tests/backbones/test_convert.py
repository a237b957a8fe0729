"""State dicts of original repositories: their published names, there and back, to equal logits."""

import re

import pytest
import torch

import dyvte
from dyvte.backbones import convert
from dyvte.backbones.convert import internvl2, llava15
from dyvte.errors import CheckpointError
from tests.helpers.families import FAMILIES
from tests.helpers.zoo.common import CLIP, IMAGE, SIGLIP, TEXT, make, noise, one_none_two


@pytest.fixture(scope="module")
def llava():
    return FAMILIES["llava"]("sdpa")


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def fresh(model, state):
    """A model of the same config and other weights, then these."""
    with torch.random.fork_rng():
        torch.manual_seed(99)
        other = type(model)(model.config).eval()
    other.load_state_dict(state, strict=True)
    return other


def renamed(state, *pairs):
    """Keys by regular expression, the first that matches; every key must."""
    out = {}
    for key, tensor in state.items():
        pattern, target = next((p, t) for p, t in pairs if re.match(p, key))
        out[re.sub(pattern, target, key)] = tensor
    return out


# LlavaLlamaForCausalLM: a LLaMA with `mm_projector` and `vision_tower` below its `model`
LLAVA15 = (
    ("^model.language_model.", "model."),
    ("^lm_head", "lm_head"),
    (r"^model.multi_modal_projector.linear_1", "model.mm_projector.0"),
    (r"^model.multi_modal_projector.linear_2", "model.mm_projector.2"),
    ("^model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
)


def test_llava15_there_and_back(llava):
    model, inputs, _ = llava
    original = renamed(model.state_dict(), *LLAVA15)
    assert "model.layers.0.self_attn.q_proj.weight" in original
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight" in original
    original["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    original["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)
    converted = convert.convert_llava15(original)
    assert converted.model_class == type(model).__name__
    assert converted.missing == ()
    assert sorted(converted.left_out) == [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
    ]
    assert torch.equal(logits(fresh(model, converted.state), inputs), logits(model, inputs))


def test_llava15_without_its_tower_says_so(llava):
    original = {k: v for k, v in renamed(llava[0].state_dict(), *LLAVA15).items() if "vision_tower" not in k}
    assert convert.convert_llava15(original).missing == ("model.vision_tower",)


def test_added_tokens_do_not_change_the_others(llava):
    model, inputs, _ = llava
    converted = convert.convert_llava15(renamed(model.state_dict(), *LLAVA15))
    grown = convert.grow_vocabulary(converted, 80)
    from copy import deepcopy

    config = deepcopy(model.config)
    config.text_config.vocab_size = 80
    larger = type(model)(config).eval()
    larger.load_state_dict(grown.state, strict=True)
    torch.testing.assert_close(logits(larger, inputs)[..., :64], logits(model, inputs), rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match="cannot grow to 10"):
        convert.grow_vocabulary(converted, 10)


def test_eagle_x5_keeps_its_language_side_and_names_the_rest(llava):
    model, _, _ = llava
    original = renamed(
        {k: v for k, v in model.state_dict().items() if not k.startswith("model.vision_tower")}, *LLAVA15
    )
    towers = [f"model.vision_tower.vision_towers.{i}.vision_tower.some.weight" for i in range(5)]
    converted = convert.convert_eagle_x5({**original, **dict.fromkeys(towers, torch.zeros(1))})
    assert list(converted.left_out) == towers
    assert converted.missing == ("model.vision_tower",)


@torch.no_grad()
def test_eagle_x5_given_its_features_answers_as_before(llava):
    model, inputs, _ = llava
    original = renamed(model.state_dict(), *LLAVA15)
    original = {key: value for key, value in original.items() if "vision_tower" not in key}
    given = convert.llava_for_features(
        convert.convert_eagle_x5(original), {"model_type": "llama", **TEXT}, IMAGE
    )
    features = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]
    with_features = {**inputs, "pixel_values": features[:, 1:]}
    assert torch.equal(logits(given, with_features), logits(model, inputs))
    # and exits work on it
    with dyvte.VisualExit.fixed(2)(model):
        expected = logits(model, inputs)[:, -1]
    with dyvte.VisualExit.fixed(2)(given) as run:
        assert torch.equal(logits(given, with_features)[:, -1], expected)
    assert run.exit_layers.tolist() == [2, -1, 2]


@pytest.fixture(scope="module")
def vila():
    """A LLaVA of VILA-1.5's parts: SigLIP tower, LLaMA."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config=SIGLIP,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    inputs = {**one_none_two([IMAGE] * 16), "pixel_values": noise(3, 3, 16, 16)}
    return make(LlavaForConditionalGeneration, config), inputs


def vila_folders(model):
    state = model.state_dict()
    language = renamed(
        {k: v for k, v in state.items() if k.startswith(("model.language_model", "lm_head"))},
        ("^model.language_model.", "model."),
        ("^lm_head", "lm_head"),
    )
    tower = {
        k.replace("model.vision_tower.", "vision_model."): v
        for k, v in state.items()
        if k.startswith("model.vision_tower.")
    }
    names = {"linear_1": "layers.0", "linear_2": "layers.2"}
    projector = {
        f"{names[k.split('.')[2]]}.{k.split('.')[3]}": v for k, v in state.items() if "multi_modal" in k
    }
    return language, tower, projector


def test_vila15_with_a_plain_projector_there_and_back(vila):
    model, inputs = vila
    converted = convert.convert_vila15(*vila_folders(model))
    assert (converted.left_out, converted.missing) == ((), ())
    assert torch.equal(logits(fresh(model, converted.state), inputs), logits(model, inputs))


def test_vila15_with_the_downsampling_projector_names_it(vila):
    model, _ = vila
    language, tower, _ = vila_folders(model)
    wide = {"layers.1.weight": torch.ones(64), "layers.1.bias": torch.ones(64)}
    wide |= {f"layers.{i}.{name}": torch.ones(1) for i in (2, 4) for name in ("weight", "bias")}
    converted = convert.convert_vila15(language, tower, wide)
    assert set(converted.left_out) == set(wide)
    assert converted.missing == ("model.multi_modal_projector",)
    with pytest.raises(CheckpointError, match="no language model"):
        convert.convert_vila15({})


@torch.no_grad()
def test_vila15_given_projected_features_answers_as_before(vila):
    model, inputs = vila
    language, tower, _ = vila_folders(model)
    converted = convert.convert_vila15(language, tower)
    given = convert.llava_for_features(converted, {"model_type": "llama", **TEXT}, IMAGE)
    features = torch.stack(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
    assert torch.equal(logits(given, {**inputs, "pixel_values": features}), logits(model, inputs))
    with pytest.raises(CheckpointError, match="do not fit"):
        convert.llava_for_features(converted, {"model_type": "llama", **TEXT, "vocab_size": 99}, IMAGE)


VISION = (
    (r"^model.vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    (r"^model.vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
    (
        r"^model.vision_tower.embeddings.patch_embeddings.projection",
        "vision_model.embeddings.patch_embedding",
    ),
    (r"^model.vision_tower.encoder.layer.(\d+).lambda_(\d)", r"vision_model.encoder.layers.\1.ls\2"),
    (
        r"^model.vision_tower.encoder.layer.(\d+).attention.projection_layer",
        r"vision_model.encoder.layers.\1.attn.proj",
    ),
    (r"^model.vision_tower.encoder.layer.(\d+).attention.", r"vision_model.encoder.layers.\1.attn."),
    (r"^model.vision_tower.encoder.layer.(\d+).layernorm_before", r"vision_model.encoder.layers.\1.norm1"),
    (r"^model.vision_tower.encoder.layer.(\d+).layernorm_after", r"vision_model.encoder.layers.\1.norm2"),
    (r"^model.vision_tower.encoder.layer.(\d+).mlp", r"vision_model.encoder.layers.\1.mlp"),
    (r"^model.multi_modal_projector.layer_norm", "mlp1.0"),
    (r"^model.multi_modal_projector.linear_1", "mlp1.1"),
    (r"^model.multi_modal_projector.linear_2", "mlp1.3"),
)
INTERNLM2 = (
    (r"^model.language_model.embed_tokens", "language_model.model.tok_embeddings"),
    (r"^model.language_model.norm", "language_model.model.norm"),
    (r"^lm_head", "language_model.output"),
    (r"^model.language_model.(.*).self_attn.o_proj", r"language_model.model.\1.attention.wo"),
    (r"^model.language_model.(.*).self_attn.(._proj)", r"language_model.model.\1.attention.\2"),
    (r"^model.language_model.(.*).mlp.gate_proj", r"language_model.model.\1.feed_forward.w1"),
    (r"^model.language_model.(.*).mlp.down_proj", r"language_model.model.\1.feed_forward.w2"),
    (r"^model.language_model.(.*).mlp.up_proj", r"language_model.model.\1.feed_forward.w3"),
    (r"^model.language_model.(.*).input_layernorm", r"language_model.model.\1.attention_norm"),
    (r"^model.language_model.(.*).post_attention_layernorm", r"language_model.model.\1.ffn_norm"),
)
SAME_NAMES = (
    (r"^model.language_model.", "language_model.model."),
    (r"^lm_head", "language_model.lm_head"),
)


def internvl(text):
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        text_config=text,
        vision_config={
            **{k: v for k, v in CLIP.items() if k not in ("image_size", "patch_size")},
            "image_size": [16, 16],
            "patch_size": [4, 4],
            "attention_bias": True,
            "use_qk_norm": True,
        },
        image_token_id=IMAGE,
        downsample_ratio=0.5,
        image_seq_length=4,
    )
    inputs = {**one_none_two([IMAGE] * 4), "pixel_values": noise(3, 3, 16, 16)}
    return make(InternVLForConditionalGeneration, config), inputs


def joined_vision(state):
    """Queries, keys and values below each other, as `attn.qkv`."""
    state = dict(state)
    for key in [k for k in state if ".attn.q_proj." in k]:
        parts = [state.pop(key.replace("q_proj", f"{n}_proj")) for n in "qkv"]
        state[key.replace("q_proj", "qkv")] = torch.cat(parts)
    return state


def joined_internlm2(state, heads, groups):
    """Head by head: each group's queries, its key, its value, as InternLM2's `wqkv`."""
    state = dict(state)
    for key in [k for k in state if ".attention.q_proj." in k]:
        q, k, v = (state.pop(key.replace("q_proj", f"{n}_proj")) for n in "qkv")
        size = q.shape[0] // heads
        rows = []
        for group in range(groups):
            for head in range(heads // groups):
                start = (group * (heads // groups) + head) * size
                rows.append(q[start : start + size])
            rows += [k[group * size : (group + 1) * size], v[group * size : (group + 1) * size]]
        state[key.replace("q_proj", "wqkv")] = torch.cat(rows)
    return state


@pytest.mark.parametrize("kind", ["internlm2", "qwen2", "llama", "phi3"])
def test_internvl2_there_and_back(kind):
    model, inputs = internvl({"model_type": "llama" if kind == "internlm2" else kind, **TEXT})
    names = (*VISION, *(INTERNLM2 if kind == "internlm2" else SAME_NAMES))
    original = joined_vision(renamed(model.state_dict(), *names))
    if kind == "internlm2":
        original = joined_internlm2(original, 4, 2)
        assert original["language_model.model.layers.0.attention.wqkv.weight"].shape == (64, 32)
    assert "vision_model.encoder.layers.1.attn.qkv.bias" in original
    converted = convert.convert_internvl2(original, num_attention_heads=4, num_key_value_heads=2)
    assert (converted.left_out, converted.missing) == ((), ())
    assert torch.equal(logits(fresh(model, converted.state), inputs), logits(model, inputs))


def test_keys_of_another_layout_are_an_error(llava):
    original = renamed(llava[0].state_dict(), *LLAVA15)
    with pytest.raises(CheckpointError, match="image_newline"):
        convert.convert_llava15({**original, "model.image_newline": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="not in the published layout"):
        convert.convert_internvl2(original, num_attention_heads=4, num_key_value_heads=2)
    joint = {"language_model.model.layers.0.attention.wqkv.weight": torch.zeros(63, 32)}
    with pytest.raises(CheckpointError, match="do not divide"):
        convert.convert_internvl2(joint, num_attention_heads=4, num_key_value_heads=2)
    twice = {"language_model.output.weight": torch.zeros(1), "language_model.lm_head.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="two keys"):
        convert.convert_internvl2(twice, num_attention_heads=4, num_key_value_heads=2)


def test_every_rule_names_its_source():
    from dyvte.backbones.convert import eagle, vila15

    tables = (
        llava15.RULES,
        eagle.RULES,
        vila15.TOWER_RULES,
        vila15.MLP_RULES,
        vila15.DOWNSAMPLE_RULES,
        internvl2.RULES,
    )
    for rule in (rule for table in tables for rule in table):
        assert re.search(r"[\w-]+/[\w.-]+ \S+\.py", rule.source), rule

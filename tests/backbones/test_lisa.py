"""LISA: published names to transformers' classes; SAM against plain functions; a folder as published."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dyvte.backbones import get_template, load_backbone
from dyvte.backbones.convert import convert_lisa
from dyvte.backbones.lisa import save_lisa
from dyvte.backbones.segmenter import FOLDER, Segmenter, load_segmenter, token_states
from dyvte.errors import CheckpointError, ConfigError
from tests.backbones.test_convert import LLAVA15, renamed
from tests.helpers import sam_reference as reference
from tests.helpers.families import FAMILIES
from tests.helpers.zoo.common import CLIP, TEXT

D = TEXT["hidden_size"]


def sam_config(**decoder):
    from transformers import SamConfig

    return SamConfig(
        vision_config={
            "hidden_size": reference.WIDTH,
            "output_channels": reference.PROMPT,
            "num_hidden_layers": reference.DEPTH,
            "num_attention_heads": reference.HEADS,
            "image_size": reference.SIDE,
            "patch_size": reference.PATCH,
            "window_size": reference.WINDOW,
            "global_attn_indexes": list(reference.GLOBAL),
            "num_pos_feats": reference.PROMPT // 2,
            "mlp_dim": 2 * reference.WIDTH,
        },
        prompt_encoder_config={
            "hidden_size": reference.PROMPT,
            "image_size": reference.SIDE,
            "patch_size": reference.PATCH,
        },
        mask_decoder_config={
            "hidden_size": reference.PROMPT,
            "mlp_dim": reference.MLP,
            "num_attention_heads": reference.HEADS,
            "iou_head_hidden_dim": reference.IOU,
            "layer_norm_eps": 1e-5,
            **decoder,
        },
    )


def lisa_state(model, seed=0):
    """A LLaVA's weights by LISA's names, with one projector layer, SAM's, and the two layers between."""
    language = renamed(
        {k: v for k, v in model.state_dict().items() if "multi_modal_projector" not in k}, *LLAVA15
    )
    language = {key: value for key, value in language.items() if "vision_tower" not in key}
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    return {
        **language,
        "model.mm_projector.weight": drawn(D, CLIP["hidden_size"]),
        "model.mm_projector.bias": drawn(D),
        "model.text_hidden_fcs.0.0.weight": drawn(D, D),
        "model.text_hidden_fcs.0.0.bias": drawn(D),
        "model.text_hidden_fcs.0.2.weight": drawn(reference.PROMPT, D),
        "model.text_hidden_fcs.0.2.bias": drawn(reference.PROMPT),
        **{f"model.visual_model.{key}": value for key, value in reference.random_state(seed).items()},
    }


@pytest.fixture(scope="module")
def llava():
    return FAMILIES["llava"]("sdpa")


@pytest.fixture(scope="module")
def state(llava):
    return lisa_state(llava[0])


@pytest.fixture(scope="module")
def head(state):
    return filled(convert_lisa(state))


def filled(parts, seg_token_id=None):
    from transformers import SamModel

    segmenter = Segmenter(SamModel(sam_config()), D, seg_token_id)
    segmenter.sam.load_state_dict(parts.sam.state)
    segmenter.text_hidden_fcs.load_state_dict(parts.text_hidden_fcs)
    return segmenter.requires_grad_(False).eval()


def test_every_name_has_its_place(state):
    from transformers import SamModel

    parts = convert_lisa(state)
    assert sorted(parts.sam.state) == sorted(SamModel(sam_config()).state_dict())
    assert sorted(parts.sam.left_out) == ["pixel_mean", "pixel_std"]
    assert parts.language.missing == ("model.vision_tower",)
    assert parts.language.left_out == ()
    # no two tensors of the source share a place, and none is lost
    placed = {id(tensor) for tensor in parts.sam.state.values()}
    held = {
        id(t) for key, t in state.items() if key.startswith("model.visual_model.") and "pixel_" not in key
    }
    assert placed == held


@torch.no_grad()
def test_sam_computes_what_the_original_names_mean(state, head):
    sam = {k.removeprefix("model.visual_model."): v for k, v in state.items() if "visual_model" in k}
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        pixels = torch.randn(3, reference.SIDE, reference.SIDE, generator=generator)
        hidden = torch.randn(D, generator=generator)
        inner = torch.relu(
            state["model.text_hidden_fcs.0.0.weight"] @ hidden + state["model.text_hidden_fcs.0.0.bias"]
        )
        prompt = state["model.text_hidden_fcs.0.2.weight"] @ inner + state["model.text_hidden_fcs.0.2.bias"]
        image = head.sam.vision_encoder(pixels[None]).last_hidden_state
        torch.testing.assert_close(image[0], reference.embed(sam, pixels), atol=1e-4, rtol=1e-4)
        expected = reference.mask_logits(sam, pixels, prompt)
        assert expected.std() > 0.01
        torch.testing.assert_close(head(hidden[None], image)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("model.text_hidden_fcs.0.2.bias", r"model\.text_hidden_fcs\.0\.2\.bias"),
        ("model.mm_projector.weight", r"model\.mm_projector\.weight"),
        ("model.visual_model.", "segment-anything"),
    ],
)
def test_what_is_missing_is_named(state, lost, named):
    with pytest.raises(CheckpointError, match=named):
        convert_lisa({key: value for key, value in state.items() if not key.startswith(lost)})


@pytest.mark.parametrize(
    "unknown",
    [
        "model.visual_model.mask_decoder.hf_token.weight",
        "model.text_hidden_fcs.1.0.weight",
        "model.mm_projector.2.weight",
        "model.image_newline",
    ],
)
def test_what_is_unknown_is_named(state, unknown):
    with pytest.raises(CheckpointError, match=unknown.removeprefix("model.visual_model.")):
        convert_lisa({**state, unknown: torch.zeros(1)})


# --- a folder as published ------------------------------------------------------------------------------


def published(folder, llava, state):
    """What LISA's ``merge_lora_weights_and_save_hf_model.py`` saves, but for the sizes; and the tower."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import CLIPVisionModel, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    source, tower = folder / "lisa", folder / "clip"
    source.mkdir()
    words = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(58)), "[SEG]", "<im_start>", "<im_end>"]
    core = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(["[SEG]"])
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    tokenizer.save_pretrained(source)
    assert len(tokenizer) == TEXT["vocab_size"]
    own = {key: value for key, value in TEXT.items() if key not in ("initializer_range", "pad_token_id")}
    settings = {**own, "bos_token_id": 1, "eos_token_id": 2, "model_type": "llava", "out_dim": 256}
    settings |= {"mm_vision_select_layer": -2, "rms_norm_eps": 1e-6, "train_mask_decoder": True}
    (source / "config.json").write_text(json.dumps(settings))
    keys = sorted(state)
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        torch.save({key: state[key] for key in part}, source / f"pytorch_model-0000{number}-of-00002.bin")
    clip = CLIPVisionModel(llava[0].config.vision_config)
    weights = {
        key.removeprefix("model.vision_tower."): value
        for key, value in llava[0].state_dict().items()
        if key.startswith("model.vision_tower.")
    }
    clip.load_state_dict(
        {key if key in clip.state_dict() else f"vision_model.{key}": v for key, v in weights.items()}
    )
    clip.save_pretrained(tower)
    size = CLIP["image_size"]
    CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    ).save_pretrained(tower)
    return source, tower


@torch.no_grad()
def test_a_published_folder_becomes_a_backbone_with_a_mask_head(tmp_path, llava, state):
    source, tower = published(tmp_path, llava, state)
    save_lisa(source, tower, tmp_path / "out", sam_config())
    model, processor = load_backbone(tmp_path / "out")
    head = load_segmenter(tmp_path / "out" / FOLDER, D)
    assert head.seg_token_id == processor.tokenizer.convert_tokens_to_ids("[SEG]") == 61
    template = get_template("auto", processor)
    prompt = template.render("w3 w4").text
    assert prompt == (
        "<s>A chat between a curious human and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the human's questions. "
        "USER: <im_start><image><im_end>\nw3 w4 ASSISTANT:"
    )
    assert template.render("w3", "[SEG].").text.endswith(
        "USER: <im_start><image><im_end>\nw3 ASSISTANT: [SEG].</s>"
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    inputs = processor(text=[prompt], images=[image], return_tensors="pt")
    ids = inputs["input_ids"]
    assert (ids == model.config.image_token_id).sum() == 16
    # the language side by hand: features of the tower's last layer but one, one linear layer, the decoder
    features = (
        llava[0]
        .model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
        .hidden_states[-2][:, 1:]
    )
    projected = features @ state["model.mm_projector.weight"].T + state["model.mm_projector.bias"]
    embedded = nn.functional.embedding(ids.clamp(max=63), state["model.embed_tokens.weight"])
    embedded[ids == model.config.image_token_id] = projected[0]
    decoder = llava[0].model.language_model
    expected = decoder(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).last_hidden_state
    found = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with token_states(model) as states:
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    torch.testing.assert_close(states[0], expected[:, -1], atol=1e-4, rtol=1e-4)


def test_another_tokenizer_and_other_shapes_are_named(tmp_path, llava, state):
    source, tower = published(tmp_path, llava, state)
    with pytest.raises(CheckpointError, match=r"(?s)SAM in .* do not fit: .*iou_prediction_head"):
        save_lisa(source, tower, tmp_path / "out", sam_config(iou_head_hidden_dim=7))
    torch.save({"model.embed_tokens.weight": torch.zeros(60, D)}, source / "pytorch_model-00003-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"embeddings of 60 tokens, its tokenizer has 64"):
        save_lisa(source, tower, tmp_path / "out", sam_config())
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text.replace("[SEG]", "[SAW]"))
    with pytest.raises(CheckpointError, match=r"lacks \[SEG\]"):
        save_lisa(source, tower, tmp_path / "out", sam_config())


def test_a_head_is_refused_by_another_model_and_its_absence_named(tmp_path, head):
    with pytest.raises(ConfigError, match=r"is no mask head: it lacks segmentation\.json.*convert_lisa\.py"):
        load_segmenter(tmp_path, D)
    head.save(tmp_path)
    with pytest.raises(CheckpointError, match=rf"width {D}, the model's are 9 wide"):
        load_segmenter(tmp_path, 9)
    again = load_segmenter(tmp_path, D)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), head.parameters(), strict=True))


# --- masks ----------------------------------------------------------------------------------------------


def test_which_token_asks():
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=2, pad_token_id=0))
    new = torch.tensor([[5, 9, 7, 9], [5, 6, 2, 9], [9, 2, 0, 0], [2, 0, 0, 0]])
    sam = nn.Module()
    sam.config = sam_config()
    assert Segmenter(sam, D, 9).steps(new, model) == [1, None, 0, None]
    assert Segmenter(sam, D, None).steps(new, model) == [3, 1, 0, 0]


@torch.no_grad()
def test_images_are_scaled_padded_and_cut_as_lisa_does(head):
    """Its ``ResizeLongestSide``, ``preprocess`` and ``postprocess_masks``, step by step."""
    rng = np.random.default_rng(4)
    for width, height in ((50, 31), (20, 44), (32, 32)):
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        scale = reference.SIDE / max(width, height)
        size = int(height * scale + 0.5), int(width * scale + 0.5)
        small = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR), dtype=np.float32)
        normal = (small - np.float32([123.675, 116.28, 103.53])) / np.float32([58.395, 57.12, 57.375])
        pixels = np.zeros((3, reference.SIDE, reference.SIDE), np.float32)
        pixels[:, : size[0], : size[1]] = normal.transpose(2, 0, 1)
        np.testing.assert_allclose(head.pixels(image), pixels, atol=1e-5)
        state = torch.randn(1, D, generator=torch.Generator().manual_seed(5))
        logits = head(state, head.sam.vision_encoder(torch.from_numpy(pixels)[None]).last_hidden_state)
        wide = nn.functional.interpolate(logits[None], (reference.SIDE,) * 2, mode="bilinear")
        own = nn.functional.interpolate(wide[..., : size[0], : size[1]], (height, width), mode="bilinear")
        (mask,) = head.masks(state, [image])
        assert mask.shape == (height, width)
        assert (mask == (own[0, 0] > 0).numpy()).all()


def test_an_image_is_embedded_once_for_its_questions(head):
    image = Image.new("RGB", (20, 20), (90, 10, 200))
    other = Image.new("RGB", (20, 20), (9, 100, 20))
    calls = []
    hook = head.sam.vision_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(args[0])), with_kwargs=True
    )
    states = torch.randn(3, D)
    first = head.masks(states, [image, other, image])
    second = head.masks(states, [image, other, image])
    hook.remove()
    assert calls == [2]
    assert all((a == b).all() for a, b in zip(first, second, strict=True))

"""Families with the processors they come with, torchvision's image and video halves included.

Elsewhere in the tests these processors have no video half, or PIL's image half; here nothing is left out.
Needs torchvision: ``scripts/test_plugins.sh torchvision`` runs it.
"""

from __future__ import annotations

import pytest
import torch

from dyvte import VisualExit
from dyvte.backbones import encode, get_template, load_backbone
from tests.helpers.models import random_image
from tests.helpers.reference import greedy_reference
from tests.helpers.zoo import llava_like, qwen_like
from tests.helpers.zoo.video_processors import VIDEO_PROCESSORS, internvl, qwen2_5_vl

pytest.importorskip("torchvision", reason="scripts/test_plugins.sh torchvision has it")

CASES = {
    "llava_onevision": (llava_like.llava_onevision, VIDEO_PROCESSORS["llava_onevision"]),
    "video_llava": (llava_like.video_llava, VIDEO_PROCESSORS["video_llava"]),
    "qwen2_vl": (qwen_like.qwen2_vl, VIDEO_PROCESSORS["qwen2_vl"]),
    "qwen2_5_vl": (qwen_like.qwen2_5_vl, qwen2_5_vl),
    "internvl": (llava_like.internvl, internvl),
}
LAYERS, NEW = 4, 3


@pytest.mark.parametrize("name", list(CASES))
def test_a_folder_is_loaded_asked_and_left_with_its_own_processor(name, tmp_path):
    make_model, make_processor = CASES[name]
    make_model("sdpa")[0].save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    model, processor = load_backbone(tmp_path)
    assert not type(processor.image_processor).__name__.endswith("Pil")
    assert processor.video_processor is not None
    template = get_template("chat", processor)
    prompts = [template.render("what is in the image ?", has_image=1), template.render("a b c", has_image=1)]
    images = [[random_image(0).resize((24, 16))], [random_image(1).resize((16, 16))]]
    inputs, _ = encode(processor, prompts, images, padding_side="left")
    ids = [processor.tokenizer.convert_tokens_to_ids(processor.image_token)]
    model.generation_config.suppress_tokens = ids  # what brute force leaves out, and no more
    assert ((inputs["input_ids"] == ids[0]).sum(1) > 1).all()
    for exits, freezes in (([LAYERS, LAYERS], None), ([1, 2], None), ([3, 3], [1, 1])):
        _, expected = greedy_reference(model, inputs, exits, ids, NEW - 1, freezes_B=freezes)
        for row, k in enumerate(exits):
            one, _ = encode(processor, prompts[row : row + 1], images[row : row + 1], padding_side="left")
            freeze = None if freezes is None else freezes[row]
            with VisualExit.fixed(k, freeze_layer=freeze)(model), torch.no_grad():
                said = model.generate(**one, max_new_tokens=NEW, do_sample=False)
            assert said[0, one["input_ids"].shape[1] :].tolist() == expected[row].tolist()

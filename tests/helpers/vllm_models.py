"""Small models that vLLM takes on a CPU: the embedded backbone with wider heads, random families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.helpers.zoo import common, llava_like, processors, qwen_like

HEAD_SIZE = 64
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# A head of 32 is the smallest that vLLM takes on a CPU; a tower's of 16 is no matter.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}


def write_padded(source: Path, folder: Path) -> Path:
    """The LLaVA at ``source`` in float32 with heads of size 64, zeros in new dimensions: the same answers.

    A head of size d turns dimension i with i + d / 2, by an angle that falls with i / d. In the wider head
    they are i and i + 32, and a larger base makes the angles what they were.
    """
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    config, text = model.config, model.config.text_config
    old = text.head_dim
    turned = torch.cat([torch.arange(old // 2), torch.arange(old // 2) + HEAD_SIZE // 2])
    plain = torch.arange(old)
    weights = model.state_dict()
    for name, tensor in weights.items():
        if "language_model" not in name or not any(part in name for part in _PROJECTIONS):
            continue
        if "o_proj" in name:
            weights[name] = _widened(tensor.t(), old, plain).t().contiguous()
        else:
            # attention divides by the root of the head's size
            scale = (HEAD_SIZE / old) ** 0.5 if "q_proj" in name else 1.0
            weights[name] = _widened(tensor * scale, old, plain if "v_proj" in name else turned)
    text.head_dim = HEAD_SIZE
    text.rope_parameters["rope_theta"] **= HEAD_SIZE / old
    config.dtype = torch.float32
    padded = LlavaForConditionalGeneration(config)
    padded.load_state_dict(weights)
    padded.generation_config = model.generation_config
    padded.save_pretrained(folder)
    AutoProcessor.from_pretrained(source).save_pretrained(folder)
    return folder


def write_family(family: str, folder: Path, *, seed: int = 0) -> Path:
    """A random model of the family, and its processor."""
    kind, config = _family(family)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
    model.generation_config.eos_token_id = common.EOS
    model.generation_config.pad_token_id = common.PAD
    model.save_pretrained(folder)
    processor = getattr(processors, family)()
    if family.startswith("qwen"):
        from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

        kind = Qwen3VLVideoProcessor if family == "qwen3_vl" else Qwen2VLVideoProcessor
        processor.video_processor = kind(patch_size=4, merge_size=2, temporal_patch_size=2)
    elif family == "internvl":
        from transformers import InternVLVideoProcessor

        processor.video_processor = InternVLVideoProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    if family == "internvl":
        # what the zoo's tokenizer is told by attributes must be read from the file
        path = folder / "tokenizer_config.json"
        names = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>"}
        extra = {f"{name}_token": token for name, token in names.items()} | {"video_token": "<video>"}
        path.write_text(json.dumps({**json.loads(path.read_text()), "extra_special_tokens": extra}))
    return folder


def _family(family: str) -> tuple[Any, Any]:
    """The zoo's model class and configuration, with wider heads."""
    if family.startswith("qwen"):
        model = getattr(qwen_like, family)("sdpa")[0]
    else:
        model = getattr(llava_like, family)("sdpa")[0]
    values = model.config.to_dict()
    text = values["text_config"]
    text |= WIDE
    text["head_dim"] = 32
    if family.startswith("qwen"):
        text["rope_parameters"]["mrope_section"] = [4, 6, 6]
        if "out_hidden_size" in values["vision_config"]:
            values["vision_config"]["out_hidden_size"] = 64
        if family == "qwen2_vl":
            values["vision_config"]["hidden_size"] = 64  # what its merger puts out
    if family == "internvl":
        text["model_type"] = "qwen3"  # norms of queries and keys by heads
    values["dtype"] = "float32"
    return type(model), type(model.config)(**values)


def _widened(rows: Tensor, old: int, places: Tensor) -> Tensor:
    """(heads x old, D) to (heads x 64, D)."""
    heads = rows.unflatten(0, (-1, old))
    wide = heads.new_zeros(len(heads), HEAD_SIZE, heads.shape[-1])
    wide[:, places] = heads
    return wide.flatten(0, 1)

"""A LISA checkpoint as published becomes a folder that `load_backbone` and `load_segmenter` read.

Source: ``dvlab-research/LISA``, ``chat.py`` (prompt, tokens), ``model/llava/conversation.py`` (``llava_v1``),
``model/segment_anything/build_sam.py`` (SAM's shape).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dyvte.backbones.convert import convert_lisa, grow_vocabulary
from dyvte.backbones.convert.renaming import EMBEDDING
from dyvte.backbones.segmenter import FOLDER, Segmenter
from dyvte.errors import CheckpointError

SEG, IMAGE = "[SEG]", "<image>"
_START, _END = "<im_start>", "<im_end>"
_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
CHAT_TEMPLATE = (
    "{{ bos_token }}" + _SYSTEM + " "
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}"
    "{{ '" + _START + IMAGE + _END + "\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' }}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# LlamaConfig's fields as LISA's config.json holds them
_TEXT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id"),
)


def sam_vit_h() -> Any:
    """The shape of ``build_sam_vit_h``, which LISA has."""
    from transformers import SamConfig

    return SamConfig(
        vision_config={
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "global_attn_indexes": [7, 15, 23, 31],
        },
        # TwoWayTransformer's norms are nn.LayerNorm's own; transformers' default is 1e-6
        mask_decoder_config={"layer_norm_eps": 1e-5},
    )


def save_lisa(
    source: str | os.PathLike[str],
    tower: str | os.PathLike[str],
    output: str | os.PathLike[str],
    sam_config: Any = None,
) -> None:
    """Convert a LISA checkpoint.

    Parameters
    ----------
    source
        Its folder: config.json, weights (safetensors, or ``pytorch_model*.bin``, of which only tensors are
        read), tokenizer.
    tower
        CLIP's, with its image processor: ``openai/clip-vit-large-patch14``.
    output
        Gets the backbone, and below it the mask head.
    sam_config
        Of SAM; None: `sam_vit_h`.

    Raises
    ------
    CheckpointError
        If files or keys are absent or unknown, or shapes do not fit; all are named.
    """
    import transformers

    source, output = Path(source), Path(output)
    try:
        settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the configuration of {source}: {error}") from error
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (SEG, _START, _END)}
    absent = [token for token, number in ids.items() if number in (None, tokenizer.unk_token_id)]
    if absent:
        raise CheckpointError(f"the tokenizer of {source} lacks {', '.join(absent)}: is it LISA's?")
    parts = convert_lisa(read_weights(source))
    rows = len(parts.language.state.get(EMBEDDING, ()))
    if rows < len(tokenizer):
        raise CheckpointError(
            f"{source} holds the embeddings of {rows} tokens, its tokenizer has {len(tokenizer)}: where are "
            f"those of {SEG}?"
        )
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    clip = transformers.CLIPVisionModel.from_pretrained(tower)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            **{name: settings[name] for name in _TEXT if name in settings},
            vocab_size=max(rows, len(tokenizer)),
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=clip.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="linear",
        vision_feature_layer=settings.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
    )
    language = grow_vocabulary(parts.language, config.text_config.vocab_size).state
    if parts.language.missing:
        own = clip.state_dict()
        language |= {f"model.vision_tower.{key.removeprefix('vision_model.')}": t for key, t in own.items()}
    model = transformers.LlavaForConditionalGeneration(config)
    _fill(model, language, f"{source} and {tower}")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    head = Segmenter(
        transformers.SamModel(sam_config or sam_vit_h()), config.text_config.hidden_size, ids[SEG]
    )
    _fill(head.sam, parts.sam.state, f"SAM in {source}")
    _fill(head.text_hidden_fcs, parts.text_hidden_fcs, f"text_hidden_fcs in {source}")
    dtype = parts.text_hidden_fcs["0.weight"].dtype
    model.to(dtype).save_pretrained(output)
    head.to(dtype).save(output / FOLDER)
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil.from_pretrained(tower),
        tokenizer=tokenizer,
        patch_size=clip.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(output)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's files.

    Raises
    ------
    CheckpointError
        If there are none, or a file holds anything but tensors.
    """
    import pickle

    import torch
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(f"{folder} holds neither *.safetensors nor pytorch_model*.bin")
    state: dict[str, Tensor] = {}
    for path in files:
        try:
            safe = path.suffix == ".safetensors"
            state |= load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"cannot read the weights in {path}: {error}") from error
    return state


def _fill(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{what} do not fit: {error}") from error

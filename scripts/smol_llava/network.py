"""The stock model's parts as training uses them: frozen tower, trained projector, lean decoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from dyvte.backbones.smol_llava import build_llava, build_tokenizer, write_decoder
from smol_llava.decoder import Layout, LoraDecoder
from smol_llava.packing import Packer, Row
from tiny_backbone.model import pixels_to_input


def prepare_decoder(cache: Path) -> Path:
    """The dequantised decoder in `cache`, written if it is not there; an interrupted write starts anew."""
    folder, draft = cache / "decoder", cache / "decoder.part"
    if not folder.exists():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write_decoder(draft)
        draft.rename(folder)
    return folder


Tower: TypeAlias = tuple[dict[str, Any], dict[str, torch.Tensor]]
"""Config and weights of a vision tower."""


def load_tower(checkpoint: Path) -> Tower:
    """The vision tower inside a LLaVA checkpoint."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vision_config"]
    weights = load_file(checkpoint / "model.safetensors")
    return config, {k.split("vision_tower.", 1)[1]: v for k, v in weights.items() if "vision_tower." in k}


class Network(nn.Module):
    """Tower (frozen), projector and adapters (trained), decoder (frozen)."""

    def __init__(
        self,
        folder: Path,
        tower: Tower,
        *,
        rank: int,
        scale: float,
        seed: int,
        compute: torch.dtype = torch.float32,
    ):
        super().__init__()
        model = build_llava(folder, *tower).requires_grad_(False)
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.decoder = LoraDecoder(model.model.language_model, rank, scale, seed, compute)
        self.projector.requires_grad_(True)
        self.tokenizer = build_tokenizer(folder)
        self.packer = Packer(self.tokenizer, model.config.image_seq_length)

    @torch.no_grad()
    def tower_features(self, images: np.ndarray) -> torch.Tensor:
        """(B, V, C) features of uint8 images (B, 64, 64, 3)."""
        return self.tower(pixels_to_input(images), output_hidden_states=True).hidden_states[-1][:, 1:]

    def visual(self, image: np.ndarray) -> torch.Tensor:
        """Visual tokens (V, D) of one image."""
        return self.projector(self.tower_features(image[None]))[0]

    def answer_logits(self, row: Row, visual_VD: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) at the n answer positions of a packed row."""
        states = self.decoder(self.inputs(row, visual_VD), row.layout)[row.layout.prefix :]
        return self.decoder.logits(states[row.wanted])

    def inputs(self, row: Row, visual_VD: torch.Tensor) -> torch.Tensor:
        """Input embeddings (N, D) of a packed row."""
        embed, packer = self.decoder.embedding, self.packer
        return torch.cat([embed[packer.before], visual_VD, embed[packer.after], embed[row.tokens]])

    def text_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) of a text (N,) without an image."""
        states = self.decoder(self.decoder.embedding[ids], Layout(len(ids)))
        return self.decoder.logits(states)

    def right(self, row: Row, logits: torch.Tensor) -> np.ndarray:
        """Per question: are all answer tokens the most likely ones?"""
        wanted = row.wanted
        wrong = logits.argmax(-1) != row.labels[wanted]
        count = torch.zeros(len(row.questions)).index_add_(0, row.owner[wanted], wrong.float())
        return (count == 0).numpy()


def answer_loss(row: Row, logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in which an answer of n tokens weighs sqrt(n): long answers do not drown short ones."""
    wanted = row.wanted
    owner = row.owner[wanted]
    length = torch.bincount(owner, minlength=len(row.questions)).clamp_(min=1)
    weight = length[owner].float().rsqrt()
    losses = F.cross_entropy(logits, row.labels[wanted], reduction="none")
    return (losses * weight).sum() / weight.sum()

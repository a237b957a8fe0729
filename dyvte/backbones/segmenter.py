"""Masks out of a language model's state, as LISA makes them (Lai et al., 2023).

The state from which the model chose ``[SEG]`` goes through two linear layers and is SAM's prompt
(``model/LISA.py``, ``evaluate``: ``output_ids[:, 1:] == seg_token_idx`` marks the position BEFORE the token,
behind the decoder's last norm). The image goes to SAM by itself, so exits and freezes change a mask through
that one state only.

Shapes: B rows, A new tokens, D hidden size of the language model, C SAM's prompt width, S side of SAM's
input, E side of its image embedding, H and W of an image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyvte.backbones.describe import unwrap
from dyvte.backbones.greedy import end_tokens, in_answer
from dyvte.errors import CheckpointError, ConfigError
from dyvte.files import write_atomically

FOLDER = "segmentation"
"""Below a backbone's folder, unless another is named."""
_SAM, _PROJECTION, _SETTINGS = "sam", "text_hidden_fcs.safetensors", "segmentation.json"
# model/segment_anything/build_sam.py, also in LISA's utils/dataset.py
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Segmenter(nn.Module):
    """SAM, and the two layers that make its prompt.

    Parameters
    ----------
    sam
        A ``SamModel``.
    hidden_size
        D.
    seg_token_id
        The token whose state is taken; None, for a model without one: the last token of the answer before its
        end token, where LISA's answers have theirs.
    """

    def __init__(self, sam: nn.Module, hidden_size: int, seg_token_id: int | None) -> None:
        super().__init__()
        self.sam = sam
        width = sam.config.prompt_encoder_config.hidden_size
        self.text_hidden_fcs = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, width)
        )
        self.seg_token_id = seg_token_id
        self._seen: tuple[list[Any], Tensor] | None = None

    @property
    def image_size(self) -> int:
        """S."""
        return self.sam.config.vision_config.image_size

    def forward(self, states_BD: Tensor, embeddings_BCEE: Tensor) -> Tensor:
        """(B, 4E, 4E) mask logits.

        Parameters
        ----------
        states_BD
            Of the language model.
        embeddings_BCEE
            SAM's, of the image of each row.
        """
        prompts_B11C = self.text_hidden_fcs(states_BD)[:, None, None]
        # text alone prompts: no points, no boxes, the learned "no mask" (prompt_encoder.py, text_embeds)
        _, nothing = self.sam.prompt_encoder(None, None, None, None)
        positions = self.sam.get_image_wide_positional_embeddings()
        masks, _ = self.sam.mask_decoder(
            image_embeddings=embeddings_BCEE,
            image_positional_embeddings=positions.repeat(len(embeddings_BCEE), 1, 1, 1),
            sparse_prompt_embeddings=prompts_B11C,
            dense_prompt_embeddings=nothing,
            multimask_output=False,
        )
        return masks[:, 0, 0]

    def embed(self, images: Sequence[Any]) -> Tensor:
        """(B, C, E, E) embeddings of RGB PIL images, each of them computed once."""
        unique = {id(image): image for image in images}
        order = [list(unique).index(id(image)) for image in images]
        if self._seen is None or [id(one) for one in self._seen[0]] != list(unique):
            pixels = torch.stack([self.pixels(image) for image in unique.values()])
            found = self.sam.vision_encoder(pixels.to(self.sam.device, self.sam.dtype)).last_hidden_state
            if torch.is_grad_enabled():
                return found[order]
            self._seen = list(unique.values()), found  # policies take turns on one batch
        return self._seen[1][order]

    def pixels(self, image: Any) -> Tensor:
        """(3, S, S): the longer side made S, normalised, then padded at the right and the bottom."""
        from PIL import Image

        height, width = self._resized(image)
        small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        values = (torch.from_numpy(np.array(small)).float() - torch.tensor(_MEAN)) / torch.tensor(_STD)
        return F.pad(values.permute(2, 0, 1), (0, self.image_size - width, 0, self.image_size - height))

    def _resized(self, image: Any) -> tuple[int, int]:
        """Height and width (segment_anything/utils/transforms.py, get_preprocess_shape)."""
        scale = self.image_size / max(image.size)
        return int(image.height * scale + 0.5), int(image.width * scale + 0.5)

    @torch.inference_mode()
    def masks(self, states_BD: Tensor, images: Sequence[Any]) -> list[np.ndarray]:
        """(H, W) bool of each row: where the logits, at the image's own size, are above 0.

        Parameters
        ----------
        states_BD
            Of the language model.
        images
            RGB PIL image of each row.
        """
        weight = self.text_hidden_fcs[0].weight
        low_res = self(states_BD.to(weight.device, weight.dtype), self.embed(images)).float()
        square = F.interpolate(low_res[:, None], (self.image_size,) * 2, mode="bilinear", align_corners=False)
        masks = []
        for image, logits in zip(images, square, strict=True):
            height, width = self._resized(image)
            own = logits[None, :, :height, :width]
            own = F.interpolate(own, image.size[::-1], mode="bilinear", align_corners=False)
            masks.append((own[0, 0] > 0).cpu().numpy())
        return masks

    def steps(self, new_BA: Tensor, model: nn.Module) -> list[int | None]:
        """Which new token of each row asks for a mask; None: none does.

        Parameters
        ----------
        new_BA
            Generated tokens.
        model
            Whose end tokens count.
        """
        own_BA = in_answer(new_BA, model).cpu()
        if self.seg_token_id is None:
            ends = torch.tensor(end_tokens(model), dtype=new_BA.dtype)
            words_B = (own_BA & ~torch.isin(new_BA.cpu(), ends)).sum(1)
            return (words_B - 1).clamp(min=0).tolist()
        asked_BA = own_BA & (new_BA.cpu() == self.seg_token_id)
        return [int(row.int().argmax()) if row.any() else None for row in asked_BA]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what `load_segmenter` reads."""
        from safetensors.torch import save_file

        folder = Path(folder)
        self.sam.save_pretrained(folder / _SAM)
        state = {key: tensor.contiguous() for key, tensor in self.text_hidden_fcs.state_dict().items()}
        save_file(state, folder / _PROJECTION)
        write_atomically(folder / _SETTINGS, json.dumps({"seg_token_id": self.seg_token_id}) + "\n")


def load_segmenter(
    folder: str | os.PathLike[str],
    hidden_size: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Segmenter:
    """A frozen mask head.

    Parameters
    ----------
    folder
        As `Segmenter.save` wrote it.
    hidden_size
        Of the language model.
    device, dtype
        Where it computes, and in what.

    Raises
    ------
    ConfigError
        If there is none.
    CheckpointError
        If it is another model's.
    """
    from safetensors.torch import load_file
    from transformers import SamModel

    folder = Path(folder)
    missing = [name for name in (_SETTINGS, _PROJECTION, _SAM) if not (folder / name).exists()]
    if missing:
        raise ConfigError(
            f"{folder} is no mask head: it lacks {', '.join(missing)}. Convert a LISA checkpoint with "
            "scripts/convert_lisa.py, train one with scripts/train_mask_head.py, or name its folder"
        )
    settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    projection = load_file(folder / _PROJECTION)
    found = projection["0.weight"].shape[1] if "0.weight" in projection else None
    if found != hidden_size:
        raise CheckpointError(
            f"{folder} projects states of width {found}, the model's are {hidden_size} wide: it is "
            "another model's head"
        )
    head = Segmenter(SamModel.from_pretrained(folder / _SAM), hidden_size, settings["seg_token_id"])
    head.text_hidden_fcs.load_state_dict(projection)
    return head.to(device, dtype).requires_grad_(False).eval()


@contextmanager
def token_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects, while entered, the state (B, D) from which each new token is chosen, behind the last norm.

    Parameters
    ----------
    model
        A transformers model, also inside wrappers; exits may be in force.
    """
    states: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states.append(inputs[0][:, -1].detach())

    hook = unwrap(model).get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield states
    finally:
        hook.remove()

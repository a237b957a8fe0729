#!/usr/bin/env python
"""Train a mask head for the embedded backbone: a tiny SAM and LISA's two layers, on frozen states of scenes.

The backbone stays as it is. Its tokenizer has no [SEG], so the state is the one from which the answer's last
word is chosen (LISA's [SEG] closes its answers too). First the states of all questions are computed with the
whole model, then the head learns from them with LISA's losses. Resumable: start the same command again.

    python scripts/train_mask_head.py --work runs/masks --output checkpoints/tiny-llava-masks
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dyvte.backbones import get_template, load_backbone
from dyvte.backbones.encode import encode
from dyvte.backbones.segmenter import Segmenter
from dyvte.data.scenes.render import IMAGE_SIZE, render
from dyvte.data.scenes.segmentation import KINDS, ask_target
from dyvte.data.scenes.world import draw_scene
from dyvte.files import publish_folder, write_atomically
from dyvte.progress import progress
from dyvte.tasks.answers.masks import filled_polygon

ROOT = Path(__file__).resolve().parents[1]
FIRST_SCENE = 5_000_000
CHUNK = 100


def parse_arguments() -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "checkpoints/tiny-llava", help="the backbone")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/masks", help="states, resume point")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "checkpoints/tiny-llava-masks", help="the finished head"
    )
    parser.add_argument("--scenes", type=int, default=1500, help="up to three questions each")
    parser.add_argument("--steps", type=int, default=1200, help="batches")
    parser.add_argument("--batch", type=int, default=12, help="scenes of a batch")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def new_head(hidden_size: int) -> Segmenter:
    """A SAM of 0.3 M parameters on 64 x 64 pixels, random: 8 x 8 embeddings, masks of 32 x 32."""
    from transformers import SamConfig, SamModel

    width = 64
    common = {"hidden_size": width, "mlp_dim": 2 * width, "num_attention_heads": 4}
    image = {"image_size": IMAGE_SIZE, "patch_size": 8}
    config = SamConfig(
        vision_config={
            **common,
            **image,
            "output_channels": width,
            "num_hidden_layers": 2,
            "use_rel_pos": False,
            "global_attn_indexes": [0, 1],
            "num_pos_feats": width // 2,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={"hidden_size": width, **image},
        mask_decoder_config={
            **common,
            "iou_head_hidden_dim": width,
            "num_multimask_outputs": 1,
            "layer_norm_eps": 1e-5,
        },
    )
    head = Segmenter(SamModel(config), hidden_size, None)
    with torch.no_grad():  # segment-anything draws the frequencies of positions with scale 1
        head.sam.shared_image_embedding.positional_embedding.normal_()
        head.sam.vision_encoder.pos_embed.normal_(std=0.02)
    return head


def chunk_of_states(model, processor, template, scenes: range, seed: int) -> dict[str, Tensor]:
    """States, which scene, kind and mask of every question about some scenes."""
    rows, images = [], []
    for number, index in enumerate(scenes):
        scene, rng = draw_scene("train", index, seed), np.random.default_rng([seed, 404, index])
        images.append(Image.fromarray(render(scene)))
        for kind in KINDS:
            if (asked := ask_target(scene, kind, rng)) is not None:
                mask = filled_polygon(asked[1], (IMAGE_SIZE, IMAGE_SIZE))
                rows.append((number, KINDS.index(kind), asked[0], mask))
    states = []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        prompts = [template.render(question.text, question.answer) for _, _, question, _ in part]
        inputs, labels_BN = encode(
            processor, prompts, [[images[row[0]]] for row in part], padding_side="right"
        )
        hidden_BND = model.model(**inputs).last_hidden_state
        # the end token is the last label; two before it the last word was chosen
        last_B = labels_BN.int().cumsum(1).argmax(1) - 2
        states.append(hidden_BND[torch.arange(len(part)), last_B])
    return {
        "states": torch.cat(states),
        "scene": torch.tensor([row[0] for row in rows]),
        "kind": torch.tensor([row[1] for row in rows]),
        "mask": torch.from_numpy(np.stack([row[3] for row in rows])),
    }


def all_states(args: argparse.Namespace) -> list[dict[str, Tensor]]:
    """The chunks, those that a killed run computed read from disk."""
    from safetensors.torch import load_file, save

    model = None
    chunks = []
    with progress(args.scenes, "states", "scene") as advance:
        for start in range(0, args.scenes, CHUNK):
            path = args.work / f"states_{args.seed}_{start:06d}.safetensors"
            if not path.exists():
                if model is None:
                    model, processor = load_backbone(args.model)
                    template = get_template("auto", processor)
                scenes = range(FIRST_SCENE + start, FIRST_SCENE + min(start + CHUNK, args.scenes))
                with torch.inference_mode():
                    found = chunk_of_states(model, processor, template, scenes, args.seed)
                write_atomically(path, save({name: one.contiguous() for name, one in found.items()}))
            chunks.append(load_file(path))
            advance(CHUNK)
    return chunks


def loss_of(logits_BHW: Tensor, masks_BHW: Tensor) -> Tensor:
    """LISA's, at the image's size: 2 x binary cross-entropy + 0.5 x dice."""
    size = masks_BHW.shape[1:]
    logits_BHW = F.interpolate(logits_BHW[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    shares_BP, truth_BP = logits_BHW.sigmoid().flatten(1), masks_BHW.flatten(1)
    dice_B = 1 - 2 * (shares_BP * truth_BP).sum(1) / (shares_BP.sum(1) + truth_BP.sum(1) + 1e-6)
    return 2 * F.binary_cross_entropy_with_logits(logits_BHW, masks_BHW) + 0.5 * dice_B.mean()


def rate_at(step: int, steps: int, highest: float) -> float:
    """100 steps of warm-up, then a cosine to zero."""
    return highest * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def main() -> int:
    """States, then steps, then the folder."""
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    chunks = all_states(args)
    offsets = np.cumsum([0] + [int(chunk["scene"].max()) + 1 for chunk in chunks])
    scene = torch.cat([chunk["scene"] + int(at) for chunk, at in zip(chunks, offsets, strict=False)])
    states, masks = torch.cat([c["states"] for c in chunks]), torch.cat([c["mask"] for c in chunks])
    torch.manual_seed(args.seed)
    head = new_head(states.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.01)
    resume, begun = args.work / "head.pt", 0
    if resume.exists():
        kept = torch.load(resume, weights_only=True)
        head.load_state_dict(kept["head"])
        optimizer.load_state_dict(kept["optimizer"])
        begun = kept["step"]
    started = time.monotonic()
    for step in range(begun, args.steps):
        rng = np.random.default_rng([args.seed, step])
        chosen = torch.from_numpy(rng.choice(args.scenes, args.batch, replace=False))
        rows = torch.isin(scene, chosen).nonzero()[:, 0]
        numbers = chosen.tolist()
        drawn = [Image.fromarray(render(draw_scene("train", FIRST_SCENE + n, args.seed))) for n in numbers]
        shown = [drawn[numbers.index(n)] for n in scene[rows].tolist()]
        loss = loss_of(head(states[rows], head.embed(shown)), masks[rows].float())
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, args.steps, args.rate)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
        if (step + 1) % 100 == 0:
            kept = {"head": head.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(kept, resume.with_suffix(".tmp"))
            resume.with_suffix(".tmp").replace(resume)
    writing = args.output.with_name(args.output.name + ".writing")
    writing.mkdir(parents=True, exist_ok=True)
    head.eval().half().save(writing)
    publish_folder(writing, args.output)
    print(f"head: {args.output} ({sum(p.numel() for p in head.parameters()):,} parameters)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

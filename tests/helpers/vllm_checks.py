"""All that is checked inside vLLM, in one process, as engines are dear to start.

``vllm_checks.py SCENES FOLDER [NAME ...]``, in the plug-in's environment: writes FOLDER/found.json, name of
an engine to what came of it; NAME: these alone. SCENES holds ``mini_gqa``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from dyvte.backbones import fingerprint, weights_digest
from dyvte.gates import GateConfig, GateStack
from dyvte.gates.offsets import uniform_freeze_offsets, uniform_offsets
from tests.helpers.vllm_engines import Engine, Request, compare
from tests.helpers.vllm_models import write_family, write_padded

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "checkpoints" / "tiny-llava"
FAMILIES = {
    "llava": "<image>",
    "llava_next": "<image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
}
SMALL_STEPS = {"block_size": 32, "max_num_batched_tokens": 48, "max_num_seqs": 8}
FEW_BLOCKS = {"block_size": 32, "max_num_batched_tokens": 160, "num_gpu_blocks_override": 14}
FEW_BLOCKS_AT_ONCE = {**FEW_BLOCKS, "max_num_batched_tokens": 256}


def scenes(folder: Path, count: int) -> list[Request]:
    """Questions about one image each, as the embedded backbone is asked."""
    entries = json.loads((folder / "mini_gqa" / "testdev_balanced_questions.json").read_text())
    images = folder / "mini_gqa" / "images"
    found = []
    for entry in list(entries.values())[:count]:
        (path,) = images.glob(entry["imageId"] + ".*")
        found.append(Request(f"<s>user <image> {entry['question']} assistant", (path,)))
    return found


def mixed(asked: list[Request], length: int) -> list[Request]:
    """Two images, one and none, with answers of one length."""
    found = []
    for number, one in enumerate(asked):
        other = asked[(number + 5) % len(asked)]
        question = one.prompt.removeprefix("<s>user <image> ")
        prompts = {
            0: (f"<s>user {question}", ()),
            1: (one.prompt, one.images),
            2: (f"<s>user <image> What shape is yellow? <image> {question}", one.images + other.images),
        }
        found.append(Request(*prompts[(2, 1, 0, 2)[number % 4]], length))
    return found


def of_family(placeholder: str, folder: Path) -> list[Request]:
    """One image, none, two of several shapes."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for number, (height, width) in enumerate(((16, 16), (16, 32), (32, 16))):
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels.numpy()).save(paths[-1])
    wide, tall = f"user {placeholder} what color is the circle ? assistant", "how many objects ? assistant"
    return [
        Request(wide, (paths[1],), 6),
        Request("user is there a square ? assistant", (), 6),
        Request(f"user what {placeholder} is {placeholder} {tall}", (paths[0], paths[2]), 6),
        Request(f"{placeholder} {tall}", (paths[0],), 6),
    ]


def gates(folder: Path, layers: int, hidden: int, *, freezes: bool, backbone: Any = None) -> str:
    """Random gates that decide differently from prompt to prompt; the policy that uses them."""
    more = {"freeze_head": True, "freeze_offsets": uniform_freeze_offsets(layers)} if freezes else {}
    config = GateConfig(
        num_layers=layers,
        hidden_size=hidden,
        offsets=uniform_offsets(layers),
        backbone=backbone or {},
        **more,
    )
    stack = GateStack.init(config, seed=5)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter *= 2.5
    stack.save_pretrained(folder)
    return f"gates:{folder}"


def engines(scene_folder: Path, folder: Path) -> Iterator[Engine]:
    """All engines, in the order in which they are started."""
    model = write_padded(EMBEDDED, folder / "embedded")
    asked = scenes(scene_folder, 24)
    some = mixed(asked[:12], 24)
    one_head = gates(folder / "one", 10, 144, freezes=False)
    two_heads = gates(folder / "two", 10, 144, freezes=True)
    yield Engine("never", model, "never", asked[:8])
    for policy in ("freeze:0", "freeze:2", "freeze:5", "fixed:3", "fixed:5", "fixed:0", "freeze:2:5"):
        yield Engine(policy, model, policy, asked)
    yield Engine("gates", model, one_head, asked)
    yield Engine("gates, two heads", model, two_heads, asked)
    yield Engine("chunks, cached prefixes", model, "freeze:2", asked, arguments=SMALL_STEPS, passes=2)
    yield Engine("chunks, exits", model, "freeze:2:5", asked, arguments=SMALL_STEPS)
    yield Engine("preempted, freeze", model, "freeze:2", some, arguments=FEW_BLOCKS)
    yield Engine("preempted, exits", model, "fixed:3", some, arguments=FEW_BLOCKS)
    yield Engine("preempted, gates", model, two_heads, some, arguments=FEW_BLOCKS_AT_ONCE)
    text_only = {"text_only_cache": True}
    plenty = {**FEW_BLOCKS, "num_gpu_blocks_override": 200}
    yield Engine("all the memory", model, "fixed:3", some, arguments=plenty)
    yield Engine("text alone in memory", model, "fixed:3", some, text_only, plenty)
    yield Engine(
        "text alone, preempted",
        model,
        "fixed:3",
        some,
        text_only,
        {**FEW_BLOCKS, "num_gpu_blocks_override": 34},
    )
    yield Engine("text alone, chunks", model, "freeze:2:5", asked, text_only, SMALL_STEPS)
    for family, placeholder in FAMILIES.items():
        random = write_family(family, folder / family)
        requests = of_family(placeholder, folder)
        decides = gates(folder / f"{family}-gates", 4, 64, freezes=True)
        for policy in ("never", "freeze:1", "fixed:2", "freeze:1:3", decides):
            yield Engine(f"{family}, {policy.split('/')[0]}", random, policy, requests)
    yield from refused(folder, asked[:1], model, two_heads)
    compiled = {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "NONE"}}
    yield Engine("compiled", folder / "llava", "freeze:1:3", of_family("<image>", folder), arguments=compiled)


def refused(folder: Path, asked: list[Request], model: Path, decides: str) -> Iterator[Engine]:
    """Engines that must not start, and the one with gates of its own backbone that must."""
    own = folder / "llava"
    loaded = AutoModelForImageTextToText.from_pretrained(own)
    backbone = {"id": "own", "fingerprint": fingerprint(loaded), "weights": weights_digest(loaded)}
    policy = gates(folder / "own", 4, 64, freezes=False, backbone=backbone)
    requests = of_family("<image>", folder)
    yield Engine("gates of their backbone", own, policy, requests)
    others = write_family("llava", folder / "others", seed=1)
    yield Engine("gates of other weights", others, policy, requests)
    yield Engine("gates of other weights, allowed", others, policy, requests, {"allow_transfer": True})
    yield Engine("gates of another shape", own, decides, requests)
    yield Engine("too deep", model, "fixed:11", asked)
    yield Engine("unknown setting", model, "fixed:3", asked, {"polcy": 1})
    yield Engine("two in a pipeline", model, "fixed:3", asked, arguments={"pipeline_parallel_size": 2})
    yield Engine("memory for gates", model, decides, asked, {"text_only_cache": True})


def main() -> None:
    """Run what is asked for."""
    scene_folder, folder, *names = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    found = {}
    for engine in engines(Path(scene_folder), Path(folder)):
        if names and not any(engine.name.startswith(name) for name in names):
            continue
        found[engine.name] = compare(engine)
        told = {k: v for k, v in found[engine.name].items() if "schedules" not in k and k != "answers"}
        print(f"{engine.name}: {told}", flush=True)
        (Path(folder) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

"""A process that writes traces of a tiny backbone, for tests that run several or kill one.

python -m tests.helpers.trace_writer FOLDER IMAGES [--rank R --world_size W]
    [--die_in_write N | --wait SECONDS]
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

from dyvte.data import Sample, Selection, selection_sha256
from dyvte.teacher import Teacher, TeacherConfig, TraceStore, write_traces
from tests.helpers.models import random_image, tiny_llava

QUESTIONS = ["how many ?", "what color is the circle ?", "is there any red square on the left ?"]
NUM_SAMPLES = 13


def selection_of(images: Path) -> Selection:
    """Samples over images that are made where they are missing."""
    images.mkdir(parents=True, exist_ok=True)
    samples = []
    for index in range(NUM_SAMPLES):
        path = images / f"{index}.png"
        if not path.exists():
            random_image(index).save(path)
        question = QUESTIONS[index % 3]
        samples.append(
            Sample(id=f"s{index}", image=path, question=question, answer="red", image_id=f"{index // 2}.png")
        )
    return Selection(samples=tuple(samples), counts={}, sha256=selection_sha256(samples))


def teacher_of() -> Teacher:
    """Two samples a shard."""
    return Teacher(*tiny_llava(layers=3), TeacherConfig(batch_size=2, shard_batches=1, max_new_tokens=3))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world_size", type=int, default=1)
    parser.add_argument(
        "--die_in_write", type=int, help="kill -9 itself between writing and naming this shard"
    )
    parser.add_argument("--wait", type=float, default=0.0, help="seconds before each shard after the first")
    args = parser.parse_args()
    replace, write = os.replace, TraceStore.write

    def replace_or_die(source: str, target: Path) -> None:
        if Path(target).name == f"shard-{args.die_in_write:05d}.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    def write_slowly(store: TraceStore, index: int, shard: object) -> None:
        if index >= args.world_size:
            time.sleep(args.wait)
        write(store, index, shard)

    if args.die_in_write is not None:
        os.replace = replace_or_die
    TraceStore.write = write_slowly
    write_traces(
        args.folder, teacher_of(), selection_of(args.images), rank=args.rank, world_size=args.world_size
    )


if __name__ == "__main__":
    main()

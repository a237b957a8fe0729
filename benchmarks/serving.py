"""Requests per second of `dyvte serve` beside `transformers serve`, under many clients at once.

Both servers run the same model on this machine, each in a process of its own; rounds alternate between them,
so that whatever else the machine does meets both. Every answer is compared with what the runtime gives alone.

    python benchmarks/serving.py --data data/scenes/instruct/test.json \
        --image_folder data/scenes/instruct/images
    python benchmarks/serving.py --data data/scenes/instruct/test.json \
        --image_folder data/scenes/instruct/images --minutes 10 --stock 0
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx
import torch
import transformers

from dyvte.backbones import get_template, load_backbone
from dyvte.evaluation.generation import Pipeline, answer, encode_rendered
from dyvte.evaluation.settings import parse_named

MAX_TOKENS = 8
NEEDED = 3.0


@dataclass(frozen=True)
class Asked:
    """A question about an image file."""

    image: Path
    question: str


@dataclass
class Round:
    """What one server did in one round."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    errors: int = 0
    wrong: int = 0

    @property
    def rate(self) -> float:
        """Requests per second that were answered."""
        return len(self.latencies) / self.seconds


def read_questions(data: Path, folder: Path, images: int, per_image: int) -> list[Asked]:
    """So many questions about each of so many images; a file with fewer asks some of them again."""
    by_image: dict[str, list[str]] = {}
    for record in json.loads(data.read_text()):
        text = record["conversations"][0]["value"].replace("<image>", "").strip()
        by_image.setdefault(record["image"], []).append(text)
    chosen = list(by_image.items())[:images]
    return [
        Asked(folder / image, text)
        for image, texts in chosen
        for text in itertools.islice(itertools.cycle(texts), per_image)
    ]


def alone(model_path: str, policy: str, asked: Sequence[Asked]) -> dict[Asked, str]:
    """What the runtime answers, in batches of one image's questions."""
    from PIL import Image

    model, processor = load_backbone(model_path)
    pipeline = Pipeline(model, processor, get_template("auto", processor), MAX_TOKENS)
    exits = parse_named(policy).exits()
    found: dict[Asked, str] = {}
    unique = list(dict.fromkeys(asked))
    for start in range(0, len(unique), 16):
        part = unique[start : start + 16]
        images = [[Image.open(one.image).convert("RGB")] for one in part]
        rendered = [pipeline.template.render(one.question) for one in part]
        batch = encode_rendered(pipeline, [str(i) for i in range(len(part))], rendered, images)
        found.update(zip(part, (one.prediction for one in answer(pipeline, batch, exits)), strict=True))
    return found


def body_of(asked: Asked, model: str, extra: dict[str, Any]) -> bytes:
    encoded = base64.b64encode(asked.image.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    content = [image, {"type": "text", "text": asked.question}]
    messages = [{"role": "user", "content": content}]
    request = {"model": model, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0.0, **extra}
    return json.dumps(request).encode()


async def load(url: str, bodies: Sequence[bytes], expected: Sequence[str], clients: int) -> Round:
    """All requests, with so many under way at any time."""
    found, waiting = Round(), iter(list(enumerate(bodies)))
    headers = {"content-type": "application/json"}
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:

        async def client() -> None:
            for at, body in waiting:
                begun = time.perf_counter()
                try:
                    reply = await http.post(f"{url}/v1/chat/completions", content=body, headers=headers)
                    text = reply.json()["choices"][0]["message"]["content"]
                except (httpx.HTTPError, KeyError, ValueError):
                    found.errors += 1
                    continue
                found.latencies.append(time.perf_counter() - begun)
                found.wrong += text.strip() != expected[at]

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        found.seconds = time.perf_counter() - begun
    return found


@contextmanager
def dyvte_server(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "dyvte", "serve", args.model, "--policy", args.policy, "--port", "0"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        for line in running.stdout:
            if found := re.search(r"at (http://\S+)", line):
                yield found[1], running.pid
                return
        raise SystemExit("dyvte serve has ended")
    finally:
        running.terminate()
        running.wait(60)


@contextmanager
def stock_server(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "transformers"
    command = [program, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command += ["--dtype", "float32", "--log-level", "error"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(f"{url}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                if running.poll() is not None:
                    raise SystemExit(
                        "transformers serve has ended: pip install transformers[serving]"
                    ) from None
                time.sleep(0.5)
        yield url, running.pid
    finally:
        running.terminate()
        running.wait(60)


def resident(pid: int) -> float:
    """MB that a process holds."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024


def shown(name: str, one: Round) -> str:
    ordered = sorted(one.latencies) or [float("nan")]
    at = {share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95)}
    return (
        f"  {name:<12} {one.rate:8.2f} requests/s   median {at[0.5]:.2f} s, 95 % {at[0.95]:.2f} s   "
        f"errors {one.errors}, other answers {one.wrong}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="checkpoints/tiny-llava")
    parser.add_argument("--policy", default="never", help="of dyvte serve; never compares equal work")
    parser.add_argument("--data", type=Path, required=True, help="LLaVA json with questions")
    parser.add_argument("--image_folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--questions", type=int, default=16, help="per image")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="parts into which the questions are cut")
    parser.add_argument(
        "--stock", type=int, default=64, help="requests of a round for transformers serve; 0: none"
    )
    parser.add_argument("--minutes", type=float, default=0.0, help="go on so long, and watch the memory")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.model = str(Path(args.model).absolute()) if Path(args.model).exists() else args.model
    asked = read_questions(args.data, args.image_folder, args.images, args.questions)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch ", end="")
    print(f"{torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    print(f"{len(asked)} questions about {args.images} images, {args.clients} clients, policy {args.policy}")
    known = alone(args.model, args.policy, asked)
    full = known if args.policy == "never" or not args.stock else alone(args.model, "never", asked)
    size = -(-len(asked) // args.rounds)
    parts = [asked[start : start + size] for start in range(0, len(asked), size)]
    kinds = {"dyvte": {}, "own images": {"visual_exit": {"share_images": False}}}
    found: dict[str, list[Round]] = {name: [] for name in (*kinds, "transformers")}
    memory: list[float] = []
    with dyvte_server(args) as (url, pid):
        if args.stock:
            with stock_server(args) as (stock_url, _):
                warm = [body_of(asked[0], args.model, {})]
                asyncio.run(load(stock_url, warm, [full[asked[0]]], 1))
                for part in parts:
                    for name, extra in kinds.items():
                        bodies = [body_of(one, args.model, extra) for one in part]
                        found[name].append(
                            asyncio.run(load(url, bodies, [known[one] for one in part], args.clients))
                        )
                        print(shown(name, found[name][-1]), flush=True)
                    few = part[:: max(1, len(part) // args.stock)][: args.stock]
                    bodies = [body_of(one, args.model, {}) for one in few]
                    found["transformers"].append(
                        asyncio.run(load(stock_url, bodies, [full[one] for one in few], args.clients))
                    )
                    print(shown("transformers", found["transformers"][-1]), flush=True)
        elif not args.minutes:
            for part in parts:
                bodies = [body_of(one, args.model, {}) for one in part]
                found["dyvte"].append(
                    asyncio.run(load(url, bodies, [known[one] for one in part], args.clients))
                )
                print(shown("dyvte", found["dyvte"][-1]), flush=True)
        until = time.monotonic() + 60 * args.minutes
        while args.minutes and time.monotonic() < until:
            part = parts[len(memory) % len(parts)]
            bodies = [body_of(one, args.model, {}) for one in part]
            found["dyvte"].append(asyncio.run(load(url, bodies, [known[one] for one in part], args.clients)))
            memory.append(resident(pid))
            print(f"{shown('dyvte', found['dyvte'][-1])}   {memory[-1]:.0f} MB", flush=True)
    for name in kinds:
        pairs = list(zip(found[name], found["transformers"]))
        if pairs:
            ratios = [one.rate / stock.rate for one, stock in pairs]
            print(f"{name} / transformers serve: {statistics.median(ratios):.2f} (needed: {NEEDED:g})")
    if len(memory) > 2:
        half = len(memory) // 2
        first, last = statistics.median(memory[:half]), statistics.median(memory[half:])
        print(f"memory: median {first:.0f} MB in the first half, {last:.0f} MB in the second")
    if args.json:
        values = {name: [vars(one) for one in rounds] for name, rounds in found.items()}
        args.json.write_text(json.dumps({"rounds": values, "memory_mb": memory}, indent=1))


if __name__ == "__main__":
    main()

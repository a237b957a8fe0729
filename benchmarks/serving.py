"""Requests per second of `dyvte serve` beside `transformers serve`, under many clients at once.

Both servers run the same model on this machine, each in a process of its own; rounds alternate between them,
so that whatever else the machine does meets both. Every answer is compared with what the runtime gives alone.

    python benchmarks/serving.py --data data/scenes/instruct/test.json \
        --image_folder data/scenes/instruct/images
    python benchmarks/serving.py --data data/scenes/instruct/test.json \
        --image_folder data/scenes/instruct/images --policy gates:checkpoints/tiny-llava-gates \
        --minutes 10 --plot memory.png
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
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # both servers: threads that spin take each other's cores

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
    cpu_seconds: float = 0.0

    @property
    def cpu_ms(self) -> float:
        """The server's processor time for a request, which other work on the machine hardly changes."""
        return 1000 * self.cpu_seconds / max(1, len(self.latencies))

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


def load(server: Server, bodies: Sequence[bytes], expected: Sequence[str], clients: int) -> Round:
    """All requests, with so many under way at any time."""
    before = processor_time(server.pid)
    found = asyncio.run(_load(server.url, bodies, expected, clients))
    found.cpu_seconds = processor_time(server.pid) - before
    return found


async def _load(url: str, bodies: Sequence[bytes], expected: Sequence[str], clients: int) -> Round:
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
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    found.errors += 1
                    print(f"  {type(error).__name__}: {error}", flush=True)
                    continue
                found.latencies.append(time.perf_counter() - begun)
                found.wrong += text.strip() != expected[at]

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        found.seconds = time.perf_counter() - begun
    return found


@dataclass(frozen=True)
class Server:
    """Where a server listens, and its process."""

    url: str
    pid: int


@contextmanager
def dyvte_server(args: argparse.Namespace) -> Iterator[Server]:
    command = [sys.executable, "-m", "dyvte", "serve", args.model, "--policy", args.policy, "--port", "0"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        for line in running.stdout:
            if found := re.search(r"at (http://\S+)", line):
                yield Server(found[1], running.pid)
                return
        raise SystemExit("dyvte serve has ended")
    finally:
        running.terminate()
        running.wait(60)


@contextmanager
def stock_server(args: argparse.Namespace) -> Iterator[Server]:
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
        yield Server(url, running.pid)
    finally:
        running.terminate()
        running.wait(60)


class MemoryWatch:
    """Samples what a process holds, every ``every`` seconds, from entering to leaving.

    ``samples``: (seconds since entering, MB).
    """

    def __init__(self, pid: int, every: float = 2.0) -> None:
        self.pid, self.every = pid, every
        self.samples: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        begun = time.monotonic()
        while not self._over.wait(self.every):
            self.samples.append((time.monotonic() - begun, resident(self.pid)))


def processor_time(pid: int) -> float:
    """Seconds that a process has computed, all threads together."""
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float:
    """MB that a process holds."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024


def growth(samples: Sequence[tuple[float, float]]) -> float:
    """MB a minute: slope of the least-squares line through the samples."""
    times, held = zip(*samples, strict=True)
    return 60 * statistics.linear_regression(times, held).slope


def tell_memory(samples: Sequence[tuple[float, float]], plot: Path | None) -> None:
    """Print what the samples say, without the first minute, in which the allocator settles; plot them all."""
    settled = [one for one in samples if one[0] >= 60] or list(samples)
    held = [one for _, one in settled]
    half = len(held) // 2
    first, last = statistics.median(held[:half]), statistics.median(held[half:])
    print(
        f"memory over {samples[-1][0] / 60:.1f} min, without the first: {min(held):.0f} .. {max(held):.0f} MB"
    )
    print(
        f"median {first:.0f} MB in its first half, {last:.0f} MB in its second, {growth(settled):+.2f} MB/min"
    )
    if plot is not None:
        from dyvte.plotting import COLORS, new_figure, plain_axes

        figure = new_figure(6.4, 2.6)
        axes = figure.add_subplot()
        axes.plot([at / 60 for at, _ in samples], [one for _, one in samples], color=COLORS[0], lw=1.2)
        axes.set(xlabel="minutes under load", ylabel="resident memory (MB)", ylim=(0, None))
        plain_axes(axes)
        figure.savefig(plot, dpi=110)


def shown(name: str, one: Round) -> str:
    ordered = sorted(one.latencies) or [float("nan")]
    at = {share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95)}
    return (
        f"  {name:<12} {one.rate:8.2f} requests/s   median {at[0.5]:.2f} s, 95 % {at[0.95]:.2f} s   "
        f"{one.cpu_ms:.1f} ms of CPU each   "
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
    parser.add_argument("--plot", type=Path, help="image file for the memory over time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.model = str(Path(args.model).absolute()) if Path(args.model).exists() else args.model
    asked = read_questions(args.data, args.image_folder, args.images, args.questions)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch ", end="")
    print(f"{torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    print(f"{len(asked)} questions about {args.images} images, {args.clients} clients, policy {args.policy}")
    size = -(-len(asked) // args.rounds)
    parts = [asked[start : start + size] for start in range(0, len(asked), size)]
    few = [part[:: max(1, len(part) // args.stock)][: args.stock] if args.stock else [] for part in parts]
    known = alone(args.model, args.policy, asked)
    full = known if args.policy == "never" else alone(args.model, "never", [asked[0], *itertools.chain(*few)])
    kinds = {"dyvte": {}, "own images": {"visual_exit": {"share_images": False}}}
    found: dict[str, list[Round]] = {name: [] for name in (*kinds, "transformers", "minutes")}
    memory: list[tuple[float, float]] = []
    with dyvte_server(args) as own:
        if args.stock:
            with stock_server(args) as stock:
                warm = [body_of(asked[0], args.model, {})]
                load(stock, warm, [full[asked[0]]], 1)
                for part, of_stock in zip(parts, few, strict=True):
                    for name, extra in kinds.items():
                        bodies = [body_of(one, args.model, extra) for one in part]
                        found[name].append(load(own, bodies, [known[one] for one in part], args.clients))
                        print(shown(name, found[name][-1]), flush=True)
                    bodies = [body_of(one, args.model, {}) for one in of_stock]
                    found["transformers"].append(
                        load(stock, bodies, [full[one] for one in of_stock], args.clients)
                    )
                    print(shown("transformers", found["transformers"][-1]), flush=True)
        elif not args.minutes:
            for part in parts:
                bodies = [body_of(one, args.model, {}) for one in part]
                found["dyvte"].append(load(own, bodies, [known[one] for one in part], args.clients))
                print(shown("dyvte", found["dyvte"][-1]), flush=True)
        if args.minutes:
            with MemoryWatch(own.pid) as watch:
                until, bodies = time.monotonic() + 60 * args.minutes, {}
                for at in itertools.cycle(range(len(parts))):
                    wanted = [known[one] for one in parts[at]]
                    if at not in bodies:
                        bodies[at] = [body_of(one, args.model, {}) for one in parts[at]]
                    found["minutes"].append(load(own, bodies[at], wanted, args.clients))
                    print(f"{shown('dyvte', found['minutes'][-1])}   {resident(own.pid):.0f} MB", flush=True)
                    if time.monotonic() >= until:
                        break
            memory = watch.samples
    for name in kinds:
        pairs = list(zip(found[name], found["transformers"]))
        if pairs:
            ratios = [one.rate / other.rate for one, other in pairs]
            less = [other.cpu_ms / one.cpu_ms for one, other in pairs]
            print(
                f"{name} / transformers serve: {statistics.median(ratios):.2f} (needed: {NEEDED:g})", end=""
            )
            print(f"; CPU time of a request of transformers serve / {name}: {statistics.median(less):.2f}")
    ours = [one for name in (*kinds, "minutes") for one in found[name]]
    answered, errors, wrong = (
        sum(map(count, ours)) for count in (lambda r: len(r.latencies), lambda r: r.errors, lambda r: r.wrong)
    )
    print(f"dyvte serve: {answered} answers, {errors} errors, {wrong} other than the runtime's own")
    if len(memory) > 4:
        tell_memory(memory, args.plot)
    if args.json:
        values = {name: [vars(one) for one in rounds] for name, rounds in found.items()}
        args.json.write_text(json.dumps({"rounds": values, "memory_mb": memory}, indent=1))


if __name__ == "__main__":
    main()

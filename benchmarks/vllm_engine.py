"""Prefill inside vLLM: stock against frozen and leaving visual tokens, in the environment with vLLM.

A random LLaVA of the published proportions (576 visual tokens), all engines in one process, asked in turn
with images that none of them has seen. The decoder's time is that of vLLM's model from its inputs to its last
hidden states; the time to the first token is that of the whole batch, image processing included.

    .venv-vllm/bin/python benchmarks/vllm_engine.py --hidden 512 --layers 16
    .venv-vllm/bin/python benchmarks/vllm_engine.py --hidden 4096 --layers 32 --dtype bfloat16 \
        --device cuda --graphs

Environment on a CPU: VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the decoder is timed in this process

import numpy as np
import torch
from common import PREFIX, PROMPT, VISUAL, Report, Times, arguments, interleaved, now, ratio, setting_of
from PIL import Image
from random_llava import build_model

from dyvte.data.scenes.processor import word_processor
from dyvte.plugins.vllm import engine_arguments

WORDS = [f"w{number}" for number in range(64)]


def write_model(args: argparse.Namespace, folder: Path) -> str:
    """The random model and a processor for it."""
    processor = word_processor(WORDS, 336, 14)
    args.vocabulary = max(args.vocabulary, len(processor.tokenizer))
    model = build_model(args)
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    model.config.text_config.eos_token_id = None
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


class Timed:
    """One engine, and how long its decoder and its requests take."""

    def __init__(self, model: str, policy: str, args: argparse.Namespace, **options: Any) -> None:
        from vllm import LLM

        self.device, self.batch, self.num_text = torch.device(args.device), args.batch, args.text
        self.random = np.random.default_rng(0)
        graphs = {} if args.graphs else {"enforce_eager": True}
        memory = {"gpu_memory_utilization": args.memory} if args.device != "cpu" else {}
        self.llm = LLM(
            model,
            dtype=args.dtype,
            max_model_len=1024,
            max_num_batched_tokens=4096,
            max_num_seqs=max(8, args.batch),
            enable_prefix_caching=False,
            limit_mm_per_prompt={"image": 1},
            mm_processor_cache_gb=0,
            **graphs,
            **memory,
            **engine_arguments(model, policy, log_requests=False, **options),
        )
        self.spent: list[tuple[int, float]] = []
        self.llm.apply_model(self._watch)

    def ask(self, tokens: int) -> float:
        """Seconds of a batch of requests about new images, for answers of so many tokens."""
        from vllm import SamplingParams

        requests = [self._request() for _ in range(self.batch)]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self.spent.clear()
        began = now(self.device)
        self.llm.generate(requests, params, use_tqdm=False)
        return now(self.device) - began

    @property
    def decoder_seconds(self) -> float:
        """Of the decoder, in the requests asked last."""
        return sum(seconds for _, seconds in self.spent)

    def decode(self) -> float:
        """Seconds of the decoder for one more token of each request."""
        self.ask(9)
        return statistics.median(seconds for rows, seconds in self.spent if rows <= self.batch)

    def _request(self) -> dict[str, Any]:
        pixels = self.random.integers(0, 256, (336, 336, 3), dtype=np.uint8)
        words, before = self.random.choice(WORDS, self.num_text), PREFIX * self.num_text // (PREFIX + PROMPT)
        text = " ".join([*words[:before], "<image>", *words[before:]])
        return {"prompt": text, "multi_modal_data": {"image": Image.fromarray(pixels)}}

    def _watch(self, model: torch.nn.Module) -> None:
        began: list[float] = []
        model.register_forward_pre_hook(lambda *_: began.append(now(self.device)))

        def after(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> None:
            self.spent.append((len(output), now(self.device) - began.pop()))

        model.register_forward_hook(after)


def engines(args: argparse.Namespace, model: str) -> dict[str, Timed]:
    """Stock first; the layers are quarters and halves of the model's."""
    quarter, half = args.layers // 4, args.layers // 2
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        "stock": ("never", {}),
        "nothing freezes": (f"freeze:{args.layers}", {}),
        "freeze L/4": (f"freeze:{quarter}", {}),
        "freeze L/2": (f"freeze:{half}", {}),
        "exit L/4": (f"fixed:{quarter}", {}),
        "exit L/4, text-only cache": (f"fixed:{quarter}", {"text_only_cache": True}),
    }
    chosen = {name: wanted[name] for name in wanted if not args.only or name in ("stock", *args.only)}
    return {name: Timed(model, policy, args, **options) for name, (policy, options) in chosen.items()}


TARGETS = {"freeze L/4": "at most 0.5", "nothing freezes": "at most 1.03"}


def measure(
    report: Report, found: dict[str, Timed], what: str, seconds: Callable[[Timed], float], rounds: int
) -> Times:
    """Time one thing with all engines in turn."""
    times = interleaved({name: (lambda one=one: seconds(one)) for name, one in found.items()}, rounds)
    add(report, what, times)
    return times


def add(report: Report, what: str, times: Times) -> None:
    """Report times and their ratios to stock."""
    targets = TARGETS if what == "prefill" else {}
    ratios = {
        f"{what}: {name} / stock": ratio(times, [name], ["stock"], targets.get(name, ""))
        for name in times
        if name != "stock"
    }
    report.add({f"{what}: {name}": values for name, values in times.items()}, ratios)


def main() -> None:
    parser = arguments(__doc__, batch=4)
    parser.add_argument(
        "--graphs", action="store_true", help="torch.compile and CUDA graphs, as vLLM chooses"
    )
    parser.add_argument("--memory", type=float, default=0.14, help="share of the GPU for each engine")
    parser.add_argument("--text", type=int, default=PREFIX + PROMPT, help="text tokens of a prompt")
    parser.add_argument("--only", nargs="*", default=[], help="these engines beside stock")
    parser.add_argument("--decode", action="store_true", help="also time decode steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(args, Path(folder))
        import vllm

        setting = setting_of(args, vllm=vllm.__version__, graphs=args.graphs)
        setting["tokens"] = f"{VISUAL} visual + {args.text} text, batch {args.batch}"
        report = Report(setting, args.json)
        found = engines(args, model)
        whole: Times = {name: [] for name in found}

        def prefill(one: Timed) -> float:
            name = next(name for name, other in found.items() if other is one)
            whole[name].append(one.ask(1))
            return one.decoder_seconds

        times = measure(report, found, "prefill", prefill, args.rounds)
        for name, values in times.items():
            rate = args.batch * (VISUAL + args.text) / statistics.median(values)
            print(f"{name:34} {rate:9.0f} prompt tokens/s")
        # the first round is not counted
        add(report, "first token", {name: values[1:] for name, values in whole.items()})
        if args.decode:
            measure(report, found, "decode", Timed.decode, args.rounds)


if __name__ == "__main__":
    main()

"""Runs vLLM engines with the plug-in, and dyvte's own runtime on the same requests, in one environment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from dyvte.plugins.vllm import engine_arguments
from dyvte.plugins.vllm.options import EngineConfig
from dyvte.runtime import VisualExit

# A process keeps the KV caches of all its engines, so they must be small: 63 MB at most.
DEFAULTS = {
    "block_size": 32,
    "num_gpu_blocks_override": 96,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "limit_mm_per_prompt": {"image": 2},
    "disable_log_stats": False,
    "seed": 0,
}


@dataclass(frozen=True)
class Request:
    """One prompt; ``length``: of its answer, which then may not end before; 0: up to 8 tokens."""

    prompt: str
    images: tuple[Path, ...]
    length: int = 0

    def opened(self) -> list[Any]:
        """RGB PIL images."""
        return [Image.open(path).convert("RGB") for path in self.images]


@dataclass(frozen=True)
class Engine:
    """One engine; ``passes``: how often it is asked everything, of which the last time counts."""

    name: str
    model: Path
    policy: str
    requests: Sequence[Request]
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    passes: int = 1


def compare(engine: Engine) -> dict[str, Any]:
    """What came of an engine, held to what dyvte's runtime answers; or the error that refused it."""
    found = run(engine)
    if "refused" in found:
        return found
    wanted = [expected(engine.model, engine.policy, request) for request in engine.requests]
    answers = found.pop("answers")
    differences = [
        abs(a - b)
        for one, other in zip(wanted, answers, strict=True)
        if one["tokens"] == other["tokens"]
        for a, b in zip(one["logprobs"], other["logprobs"], strict=True)
    ]
    schedules = {str(n): one["schedule"] for n, one in enumerate(wanted) if one["schedule"] is not None}
    return {
        **found,
        "asked": len(wanted),
        "equal": sum(a["tokens"] == b["tokens"] for a, b in zip(wanted, answers, strict=True)),
        "largest_difference": max(differences, default=float("nan")),
        "schedules_wanted": schedules,
        "answers": answers,
    }


def run(engine: Engine) -> dict[str, Any]:
    """What came of one engine: answers, schedules, what its scheduler did."""
    from vllm import LLM

    began = time.perf_counter()
    arguments = {**DEFAULTS, **engine.arguments}
    try:
        arguments |= engine_arguments(str(engine.model), engine.policy, **engine.options)
        llm = LLM(str(engine.model), **arguments)
    except Exception as error:
        return {"refused": str(error)}
    found: dict[str, Any] = {"start_s": round(time.perf_counter() - began, 1)}
    blocks = _count_blocks(llm)
    for _ in range(engine.passes):
        outputs = llm.generate(
            [_prompt(request) for request in engine.requests],
            [_params(number, request) for number, request in enumerate(engine.requests)],
            use_tqdm=False,
        )
    (schedules,) = llm.apply_model(_schedules)
    found |= {
        "answers": [_answer(output) for output in outputs],
        "schedules": {one.tag: [one.freeze_layer, one.exit_layer] for one in schedules},
        "preemptions": sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"),
        "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
        "groups": _groups(llm),
        "most_blocks": max(blocks),
        "seconds": round(time.perf_counter() - began, 1),
    }
    # This cleans up after itself, and the next engine collects what is left before it starts: to walk through
    # a heap of this size once more takes as long as the prompts do.
    llm.llm_engine.engine_core.shutdown()
    return found


@cache
def expected(model: Path, policy: str, request: Request) -> dict[str, Any]:
    """Tokens, their log-probabilities and the schedule that dyvte's runtime comes to, for one prompt."""
    backbone, processor = _loaded(model)
    shown = {"images": request.opened()} if request.images else {}
    inputs = processor(text=request.prompt, return_tensors="pt", **shown)
    length = {"min_new_tokens": request.length, "max_new_tokens": request.length or 8}
    exits = VisualExit.from_policy(EngineConfig(policy=policy).parsed(), allow_transfer=True)
    with exits(backbone) as run_, torch.inference_mode():
        output = backbone.generate(
            **inputs, **length, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logits = [step[0].float() for step in output.logits]  # before anything is forbidden, as in vLLM
    schedule = [int(run_.freeze_layers[0]), int(run_.exit_layers[0])] if run_.records else None
    return {
        "tokens": tokens,
        "logprobs": [float(step.log_softmax(-1)[t]) for step, t in zip(logits, tokens, strict=True)],
        "schedule": schedule,
    }


@cache
def _loaded(model: Path) -> tuple[Any, Any]:
    backbone = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    return backbone, AutoProcessor.from_pretrained(model)


def _prompt(request: Request) -> dict[str, Any]:
    images = request.opened()
    return {"prompt": request.prompt, **({"multi_modal_data": {"image": images}} if images else {})}


def _params(number: int, request: Request) -> Any:
    from vllm import SamplingParams

    length = {"min_tokens": request.length, "max_tokens": request.length or 8}
    return SamplingParams(temperature=0, logprobs=1, extra_args={"dyvte_id": str(number)}, **length)


def _answer(output: Any) -> dict[str, Any]:
    (one,) = output.outputs
    chosen = [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)]
    return {"tokens": list(one.token_ids), "logprobs": chosen}


def _schedules(model: Any) -> Any:
    return model.visual_schedules() if hasattr(model, "visual_schedules") else []


def _core(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def _groups(llm: Any) -> list[list[Any]]:
    groups = _core(llm).scheduler.kv_cache_config.kv_cache_groups
    return [[type(group.kv_cache_spec).__name__, len(group.layer_names)] for group in groups]


def _count_blocks(llm: Any) -> list[int]:
    """A list that gets the number of KV cache blocks in use, whenever some are taken."""
    pool, seen = _core(llm).scheduler.kv_cache_manager.block_pool, [0]
    own, free = pool.get_new_blocks, pool.get_num_free_blocks()

    def counted(number: int) -> Any:
        taken = own(number)
        seen.append(free - pool.get_num_free_blocks())
        return taken

    pool.get_new_blocks = counted
    return seen

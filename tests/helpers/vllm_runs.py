"""Runs vLLM engines with the plug-in, in the plug-in's environment: ``vllm_runs.py PLAN OUTPUT``.

PLAN is a JSON list of engines: ``name``, ``model``, ``options`` (the plug-in's; absent: stock vLLM),
``arguments`` of ``vllm.LLM``, ``requests`` of ``prompt``, ``images`` (files), ``max_tokens``, ``min_tokens``.
OUTPUT gets what came of each: tokens, their log-probabilities, schedules, or the error that refused it. An
engine with ``passes`` is asked so often, and its last answers count.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from dyvte.plugins.vllm import engine_arguments

DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "limit_mm_per_prompt": {"image": 2},
    "disable_log_stats": False,
    "seed": 0,
}


def run(engine: dict[str, Any]) -> dict[str, Any]:
    """What came of one engine."""
    began = time.perf_counter()
    arguments = {**DEFAULTS, **engine.get("arguments", {})}
    try:
        if engine.get("options") is not None:
            arguments |= engine_arguments(engine["model"], **engine["options"])
        llm = LLM(engine["model"], **arguments)
    except Exception as error:
        return {"refused": str(error)}
    started = time.perf_counter()
    found: dict[str, Any] = {"start_s": started - began}
    for _ in range(engine.get("passes", 1)):
        outputs = llm.generate(
            [_prompt(one) for one in engine["requests"]],
            [_params(number, one) for number, one in enumerate(engine["requests"])],
            use_tqdm=False,
        )
    found["answers"] = [_answer(output) for output in outputs]
    found["schedules"] = _schedules(llm)
    found["preemptions"] = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    found["cached_tokens"] = sum(output.num_cached_tokens or 0 for output in outputs)
    found["groups"] = _groups(llm)
    found["run_s"] = time.perf_counter() - started
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()
    return found


def _prompt(request: dict[str, Any]) -> dict[str, Any]:
    images = [Image.open(path).convert("RGB") for path in request["images"]]
    return {"prompt": request["prompt"], **({"multi_modal_data": {"image": images}} if images else {})}


def _params(number: int, request: dict[str, Any]) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=request.get("max_tokens", 8),
        min_tokens=request.get("min_tokens", 0),
        logprobs=1,
        extra_args={"dyvte_id": str(number)},
    )


def _answer(output: Any) -> dict[str, Any]:
    (one,) = output.outputs
    chosen = [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)]
    return {"tokens": list(one.token_ids), "logprobs": chosen}


def _schedules(llm: LLM) -> dict[str, list[int]]:
    (found,) = llm.apply_model(_of_model)
    return {one.tag: [one.freeze_layer, one.exit_layer] for one in found}


def _of_model(model: Any) -> Any:
    return model.visual_schedules() if hasattr(model, "visual_schedules") else []


def _groups(llm: LLM) -> list[list[Any]]:
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        return []
    groups = core.scheduler.kv_cache_config.kv_cache_groups
    return [[type(group.kv_cache_spec).__name__, len(group.layer_names)] for group in groups]


def main() -> None:
    """Run the plan."""
    plan, output = map(Path, sys.argv[1:])
    found = {}
    for engine in json.loads(plan.read_text()):
        found[engine["name"]] = run(engine)
        print(engine["name"], {k: v for k, v in found[engine["name"]].items() if k != "answers"}, flush=True)
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

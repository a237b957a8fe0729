"""What is refused when an engine starts, by name: all that would not be exact, or has not been seen to be.

vLLM calls the hook of an architecture with its whole configuration, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dyvte.backbones.describe import describe_config
from dyvte.errors import ConfigError, UnsupportedBackboneError
from dyvte.plugins.vllm.book import RequestBook
from dyvte.plugins.vllm.names import KEY, VERSIONS
from dyvte.plugins.vllm.options import (
    EngineConfig,
    Options,
    check_made_for,
    engine_config,
    last_layer,
    may_leave,
    options_of,
)
from dyvte.policies import LearnedPolicy, NeverPolicy, Policy

Tell = Callable[[str], None]


def config_hook(stock: Any = None) -> Any:
    """A class for vLLM's ``MODELS_CONFIG_MAP``; ``stock`` is that of the architecture that ours extends."""

    class DyvteConfigHook:
        """Checks and completes the configuration of an engine of ours."""

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            """As the stock architecture's."""
            if stock is not None:
                stock.verify_and_update_model_config(model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            """The stock architecture's, then ours."""
            if stock is not None:
                stock.verify_and_update_config(vllm_config)
            prepare(vllm_config)

    return DyvteConfigHook


def prepare(vllm_config: Any) -> None:
    """Check an engine's configuration, switch off what would not be exact, and put the book of requests in.

    Raises
    ------
    ConfigError, UnsupportedBackboneError
        Naming each thing that cannot go together with the policy.
    """
    from vllm import __version__ as version
    from vllm.logger import init_logger

    from dyvte.plugins.vllm.names import LOGGER

    check_version(version)
    if options_of(vllm_config) is not None:
        return
    given = (vllm_config.additional_config or {}).get(KEY)
    if given is None:
        return
    config = engine_config(given)
    policy = config.parsed()
    shape = describe_config(vllm_config.model_config.model)
    policy.check(shape.num_layers, shape.hidden_size)
    check_made_for(policy, {"fingerprint": shape.fingerprint}, config)
    if not isinstance(policy, NeverPolicy):
        refuse(vllm_config, policy, config, shape.num_layers)
        adapt(vllm_config, policy, config, shape.num_layers, init_logger(LOGGER).info)
    book = RequestBook(shape.visual_token_ids, vllm_config.scheduler_config.max_num_seqs)
    vllm_config.additional_config[KEY] = Options(given, book)


def check_version(version: str) -> None:
    """Raise ConfigError for a vLLM that the plug-in was not run with."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    if Version(Version(version).base_version) not in SpecifierSet(VERSIONS):
        raise ConfigError(
            f"vLLM {version}: dyvte's plug-in works inside its model runner and was run with vLLM {VERSIONS} "
            "only; install such a version"
        )


def refuse(vllm_config: Any, policy: Policy, config: EngineConfig, num_layers: int) -> None:
    """Raise UnsupportedBackboneError with everything that the engine must do without."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    found = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "tensor parallelism (not seen to work yet)": parallel.tensor_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "dual batch overlap": bool(getattr(parallel, "enable_dbo", False)),
        "speculative decoding": vllm_config.speculative_config is not None,
        "KV connectors": vllm_config.kv_transfer_config is not None,
        "LoRA adapters": vllm_config.lora_config is not None,
        "a quantised KV cache": str(vllm_config.cache_config.cache_dtype).startswith(("fp8", "int", "nvfp4")),
        "fast prefill of shared KV caches": bool(
            getattr(vllm_config.cache_config, "kv_sharing_fast_prefill", False)
        ),
        "prompts given as embeddings": bool(getattr(model, "enable_prompt_embeds", False)),
        "pruned video tokens (video_pruning_rate)": _prunes_videos(model),
        "pooling": model.runner_type != "generate",
        "model runner V2, which has not been seen to work yet (VLLM_USE_V2_MODEL_RUNNER=0)": bool(
            vllm_config.use_v2_model_runner
        ),
        "CUDA graphs of whole mixed batches (cudagraph_mode FULL)": _graphs(vllm_config) == "FULL",
    }
    if may_leave(policy, num_layers):
        whole = _graphs(vllm_config).startswith("FULL_")
        found["CUDA graphs of whole decode batches with exits (cudagraph_mode PIECEWISE serves)"] = whole
    named = [name for name, there in found.items() if there]
    if named:
        raise UnsupportedBackboneError(
            f"policy {config.policy} inside vLLM cannot go together with {'; nor with '.join(named)}"
        )
    if config.text_only_cache and (
        isinstance(policy, LearnedPolicy) or not 0 < last_layer(policy, num_layers) < num_layers
    ):
        raise ConfigError(
            f"text_only_cache with policy {config.policy}: memory is set aside before anything is decided, "
            f"so it is for a fixed exit after layer 1..{num_layers - 1} alone (fixed:K or freeze:F:K)"
        )


def adapt(vllm_config: Any, policy: Policy, config: EngineConfig, num_layers: int, tell: Tell) -> None:
    """Switch off, and say so, what the engine would do by default and must not with this policy."""
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    learned, leaves = isinstance(policy, LearnedPolicy), may_leave(policy, num_layers)
    if (learned or leaves) and cache.enable_prefix_caching:
        cache.enable_prefix_caching = False
        why = (
            "what an image leaves in deep layers depends on the question"
            if learned
            else "text closes up there"
        )
        tell(f"dyvte: prefix caching is off with policy {config.policy}: {why}")
    if learned and scheduler.enable_chunked_prefill:
        scheduler.enable_chunked_prefill = False
        tell(f"dyvte: chunked prefill is off with policy {config.policy}: gates read a whole prompt at once")
    longest = vllm_config.model_config.max_model_len
    if learned and scheduler.max_num_batched_tokens < longest:
        scheduler.max_num_batched_tokens = longest
        tell(f"dyvte: max_num_batched_tokens is {longest}, the longest prompt")
    if _may_use_graphs(vllm_config):
        if leaves:
            _use_piecewise_graphs(vllm_config)
        else:
            # A graph of a decode batch would run a piece of one visual token as if it were text.
            scheduler.disable_chunked_mm_input = True
    if config.text_only_cache:
        scheduler.async_scheduling = bool(scheduler.async_scheduling)
        name = "AsyncTextOnlyScheduler" if scheduler.async_scheduling else "TextOnlyScheduler"
        scheduler.scheduler_cls = f"dyvte.plugins.vllm.text_cache.{name}"
        scheduler.disable_hybrid_kv_cache_manager = False


def _prunes_videos(model_config: Any) -> bool:
    given = getattr(model_config, "multimodal_config", None)
    return given is not None and bool(given.is_multimodal_pruning_enabled())


def _graphs(vllm_config: Any) -> str:
    """The CUDA graph mode that the user chose; empty where vLLM is to choose."""
    return getattr(vllm_config.compilation_config.cudagraph_mode, "name", "")


def _may_use_graphs(vllm_config: Any) -> bool:
    from vllm.platforms import current_platform

    return not (current_platform.is_cpu() or vllm_config.model_config.enforce_eager)


def _use_piecewise_graphs(vllm_config: Any) -> None:
    from vllm.config import CUDAGraphMode

    if vllm_config.compilation_config.cudagraph_mode is None:
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE

"""The plug-in's settings for vLLM, what it refuses, and what it does without vLLM."""

from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
from types import SimpleNamespace

import pytest
import torch

from dyvte.errors import ConfigError, UnsupportedBackboneError
from dyvte.gates import GateConfig, GateStack
from dyvte.plugins.vllm import engine_arguments, register
from dyvte.plugins.vllm.book import RequestBook
from dyvte.plugins.vllm.check import command_line, findings, main
from dyvte.plugins.vllm.checks import adapt, check_version, refuse
from dyvte.plugins.vllm.frozen import KeyValueWriter
from dyvte.plugins.vllm.names import ARCHITECTURES
from dyvte.plugins.vllm.options import (
    EngineConfig,
    Options,
    engine_config,
    last_layer,
    may_leave,
    our_architecture,
)
from dyvte.plugins.vllm.reports import Reports
from tests.helpers.models import tiny_llava

LAYERS, HIDDEN = 4, 32
PRUNES = SimpleNamespace(is_multimodal_pruning_enabled=lambda: True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random backbone, and gates for it."""
    root = tmp_path_factory.mktemp("model")
    model, processor = tiny_llava(LAYERS, HIDDEN)
    model.save_pretrained(root)
    processor.save_pretrained(root)
    GateStack.init(GateConfig(num_layers=LAYERS, hidden_size=HIDDEN)).save_pretrained(root / "gates")
    return root


def engine(**changes):
    """A configuration of vLLM's shape, with nothing in it that must be refused."""
    parts = {
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "tensor_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "enable_dbo": False,
        },
        "model_config": {
            "runner_type": "generate",
            "enable_prompt_embeds": False,
            "max_model_len": 900,
            "enforce_eager": True,
        },
        "cache_config": {"cache_dtype": "auto", "enable_prefix_caching": True},
        "scheduler_config": {
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": 512,
            "async_scheduling": None,
        },
        "compilation_config": {"cudagraph_mode": None},
    }
    whole = {"speculative_config": None, "kv_transfer_config": None, "lora_config": None}
    config = SimpleNamespace(**whole, use_v2_model_runner=False)
    for name, values in parts.items():
        setattr(config, name, SimpleNamespace(**{**values, **changes.pop(name, {})}))
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_settings_are_checked():
    config = engine_config({"policy": "freeze:1:3", "text_only_cache": True})
    assert (config.policy, config.text_only_cache, config.allow_transfer) == ("freeze:1:3", True, False)
    with pytest.raises(
        ConfigError, match="additional-config dyvte: unknown key 'polcy'; did you mean 'policy'"
    ):
        engine_config({"polcy": "never"})
    with pytest.raises(ConfigError, match="expected an object"):
        engine_config("freeze:1")
    with pytest.raises(ConfigError, match="policy random:1-3 is not served inside vLLM"):
        EngineConfig(policy="random:1-3").parsed()


def test_what_a_policy_lets_go(folder):
    def policy(text):
        return EngineConfig(policy=text).parsed()

    assert [last_layer(policy(text), 4) for text in ("never", "freeze:2", "freeze:1:3", "fixed:0")] == [
        4,
        4,
        3,
        0,
    ]
    kept = ("never", "freeze:0", "freeze:2:4", "fixed:4")
    assert not any(may_leave(policy(text), 4) for text in kept)
    assert all(may_leave(policy(text), 4) for text in ("fixed:3", "freeze:1:3", f"gates:{folder / 'gates'}"))


def test_options_keep_the_book_through_a_process(folder):
    options = pickle.loads(pickle.dumps(Options({"policy": "fixed:2"}, RequestBook([7], 4))))  # noqa: S301 our own
    assert json.dumps(options) == '{"policy": "fixed:2"}'
    assert options.config.policy == "fixed:2"
    assert options.book.visual_token_ids.tolist() == [7]


@pytest.mark.parametrize(
    ("policy", "changes", "named"),
    [
        ("fixed:2", {"parallel_config": {"pipeline_parallel_size": 2}}, "pipeline parallelism"),
        ("fixed:2", {"parallel_config": {"tensor_parallel_size": 2}}, "tensor parallelism"),
        ("fixed:2", {"parallel_config": {"decode_context_parallel_size": 2}}, "decode context parallelism"),
        ("freeze:2", {"speculative_config": object()}, "speculative decoding"),
        ("freeze:2", {"kv_transfer_config": object()}, "KV connectors"),
        ("freeze:2", {"lora_config": object()}, "LoRA adapters"),
        ("freeze:2", {"model_config": {"multimodal_config": PRUNES}}, "pruned video tokens"),
        ("freeze:2", {"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ("freeze:2", {"cache_config": {"cache_dtype": "fp8_e4m3"}}, "a quantised KV cache"),
        (
            "freeze:2",
            {"compilation_config": {"cudagraph_mode": SimpleNamespace(name="FULL")}},
            "mixed batches",
        ),
        (
            "fixed:2",
            {"compilation_config": {"cudagraph_mode": SimpleNamespace(name="FULL_AND_PIECEWISE")}},
            "PIECEWISE serves",
        ),
    ],
)
def test_what_would_not_be_exact_is_refused_by_name(policy, changes, named):
    config = EngineConfig(policy=policy)
    with pytest.raises(
        UnsupportedBackboneError, match=f"policy {policy} inside vLLM cannot go together"
    ) as caught:
        refuse(engine(**changes), config.parsed(), config, LAYERS)
    assert named in str(caught.value)


def test_an_ordinary_engine_is_not_refused(folder):
    graphs = {"compilation_config": {"cudagraph_mode": SimpleNamespace(name="FULL_AND_PIECEWISE")}}
    for policy, changes in (("freeze:2", graphs), ("fixed:2", {}), (f"gates:{folder / 'gates'}", {})):
        config = EngineConfig(policy=policy)
        refuse(engine(**changes), config.parsed(), config, LAYERS)


@pytest.mark.parametrize("policy", ["freeze:2", "fixed:4", "fixed:0", "gates"])
def test_memory_can_be_saved_with_a_fixed_exit_alone(policy, folder):
    text = f"gates:{folder / 'gates'}" if policy == "gates" else policy
    config = EngineConfig(policy=text, text_only_cache=True)
    with pytest.raises(ConfigError, match=r"for a fixed exit after layer 1..3 alone"):
        refuse(engine(), config.parsed(), config, LAYERS)


@pytest.mark.parametrize(
    ("policy", "caching", "chunks", "tokens"),
    [("freeze:2", True, True, 512), ("freeze:1:3", False, True, 512), ("gates", False, False, 900)],
)
def test_what_an_engine_does_by_default_is_switched_off(policy, caching, chunks, tokens, folder, monkeypatch):
    monkeypatch.setattr("dyvte.plugins.vllm.checks._may_use_graphs", lambda config: False)
    config = EngineConfig(policy=f"gates:{folder / 'gates'}" if policy == "gates" else policy)
    changed, told = engine(), []
    adapt(changed, config.parsed(), config, LAYERS, told.append)
    assert changed.cache_config.enable_prefix_caching is caching
    assert changed.scheduler_config.enable_chunked_prefill is chunks
    assert changed.scheduler_config.max_num_batched_tokens == tokens
    assert len(told) == (not caching) + (not chunks) + (tokens != 512)


def test_only_versions_that_were_run_are_taken():
    for version in ("0.32.0", "0.32.1+cpu", "0.32.1.dev3"):
        check_version(version)
    for version in ("0.31.9", "0.33.0"):
        with pytest.raises(ConfigError, match=f"vLLM {version}: dyvte's plug-in works inside"):
            check_version(version)


def test_architectures_are_named(folder):
    assert engine_arguments(str(folder), "fixed:2", allow_transfer=True) == {
        "hf_overrides": {"architectures": ["DyvteLlavaForConditionalGeneration"]},
        "additional_config": {"dyvte": {"policy": "fixed:2", "allow_transfer": True}},
    }
    assert all(ours == f"Dyvte{stock}" for ours, stock in ARCHITECTURES.items())
    with pytest.raises(UnsupportedBackboneError, match="does not serve GemmaForCausalLM; it serves LlavaFor"):
        our_architecture(SimpleNamespace(architectures=["GemmaForCausalLM"], model_type="gemma"))


def test_without_vllm_nothing_breaks(caplog, folder):
    """The entry point says so; the check says what to install, and all that it can know."""
    with caplog.at_level(logging.WARNING):
        register()
    assert "does not know this vLLM" in caplog.text
    found = {one.about: one for one in findings(str(folder), "fixed:2")}
    assert not found["vLLM"].holds
    assert found["architecture"].text == "DyvteLlavaForConditionalGeneration"
    assert found["policy fixed:2"].text == "served; off with it: prefix caching"
    assert "expected 0..4" in findings(str(folder), "fixed:9")[-1].text
    assert main([str(folder)]) == 1
    assert "vllm serve" in command_line(str(folder), "fixed:2")


def test_gates_of_another_backbone_are_seen_before_a_start(folder, tmp_path):
    config = GateConfig(num_layers=LAYERS, hidden_size=HIDDEN, backbone={"fingerprint": "x", "id": "other"})
    GateStack.init(config).save_pretrained(tmp_path)
    assert "made for other" in findings(str(folder), f"gates:{tmp_path}")[-1].text
    assert findings(str(folder), f"gates:{tmp_path}", allow_transfer=True)[-1].holds


def test_keys_and_values_are_written_alone():
    """Those of the whole projection, from a part of it; keys normed by heads where the family does that."""
    torch.manual_seed(0)
    written = {}
    attention = torch.nn.Module()
    attention.q_size, attention.kv_size, attention.head_dim = 8, 4, 2
    attention.qkv_proj = torch.nn.Linear(6, 16)
    attention.rotary_emb = lambda positions, query, key: (query, key + positions[:, None])
    attention.k_norm = torch.nn.Tanh()
    attention.attn = SimpleNamespace(
        kv_cache="cache",
        impl=SimpleNamespace(
            do_kv_cache_update=lambda layer, k, v, cache, slots: written.update(k=k, v=v, s=slots)
        ),
    )
    layer = torch.nn.Module()
    layer.self_attn, layer.input_layernorm = attention, torch.nn.LayerNorm(6)
    hidden, positions = torch.randn(3, 6), torch.arange(3.0)
    writer = KeyValueWriter(layer)
    keys, values = attention.qkv_proj(layer.input_layernorm(hidden))[:, 8:].split([4, 4], -1)
    writer.keep_projection()
    attention.qkv_proj = None
    writer.write(hidden, positions, "slots")
    assert written["s"] == "slots"
    torch.testing.assert_close(written["k"], (keys.tanh() + positions[:, None]).reshape(3, 2, 2))
    torch.testing.assert_close(written["v"], values.reshape(3, 2, 2))
    with pytest.raises(UnsupportedBackboneError, match="its attention has no qkv_proj, rotary_emb"):
        KeyValueWriter(torch.nn.Linear(2, 2))


def test_decisions_are_taken_down(caplog):
    book = RequestBook([9], 4)
    book.update([], [(0, [1, 9, 9, 2], "mine")], [])
    book.rows[0].decide(1, 3)
    reports = Reports(4, log=True)
    with caplog.at_level(logging.INFO, logger="vllm.plugins.dyvte"):
        reports.add(book.rows[0])
    (one,) = reports.schedules
    assert (one.tag, one.num_tokens, one.num_visual) == ("mine", 4, 2)
    assert (one.freeze_layer, one.exit_layer, one.visual_compute) == (1, 3, 0.25)
    assert "prompt mine of 4 tokens, 2 visual: updated in layers 1..1, read up to layer 3 of 4" in caplog.text


@pytest.mark.parametrize(("child", "shared"), [(True, False), (True, True), (False, False)])
def test_counters_that_nobody_can_see_are_said_to_be(child, shared, caplog, monkeypatch):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object() if child else None)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    if shared:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "somewhere")
    with caplog.at_level(logging.INFO, logger="vllm.plugins.dyvte"):
        Reports(4, log=True)
    assert ("set PROMETHEUS_MULTIPROC_DIR to an empty folder" in caplog.text) == (child and not shared)


def test_a_prompt_that_is_never_updated_is_said_to_be(caplog):
    book = RequestBook([9], 4)
    book.update([], [(0, [1, 9, 2], None)], [])
    book.rows[0].decide(0, 4)
    with caplog.at_level(logging.INFO, logger="vllm.plugins.dyvte"):
        Reports(4, log=True).add(book.rows[0])
    assert "prompt of 3 tokens, 1 visual: updated in no layer, read up to layer 4 of 4" in caplog.text

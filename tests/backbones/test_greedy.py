"""One greedy: argmax by brute force, whatever the checkpoint's generation_config.json asks for."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch

from dyvte.backbones import BackboneConfig, decoding_identity, generate_greedily, get_template
from dyvte.backbones.greedy import in_answer
from dyvte.errors import CheckpointError, ConfigError
from dyvte.evaluation.generation import Batch, Pipeline, answer
from dyvte.evaluation.runner import EvalConfig, run_policies
from dyvte.evaluation.settings import parse_policies
from dyvte.runtime import VisualExit
from dyvte.tasks.base import get_benchmark
from dyvte.teacher import Teacher, TeacherConfig, TraceStore, greedy_answers
from dyvte.teacher.store import Manifest
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch
from tests.helpers.fixtures import write_mini_gqa
from tests.helpers.models import tiny_llava

TOKENS = 8
DEFAULTS = {
    "repetition penalty": {"repetition_penalty": 1.5},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_p": 0.6, "top_k": 5},
    "tiny temperature": {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05, "top_k": 1},
    "n-grams": {"no_repeat_ngram_size": 1},
    "beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "sequences": {"num_return_sequences": 2, "do_sample": True},
    "lengths": {"min_length": 90, "max_length": 20},
    "new tokens": {"min_new_tokens": 30, "max_new_tokens": 2},
    "suppressed": {"suppress_tokens": list(range(5, 30)), "begin_suppress_tokens": list(range(30, 40))},
    "forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 8, "bad_words_ids": [[9], [10], [11], [12]]},
    "bias": {"sequence_bias": [[[20], 50.0]], "exponential_decay_length_penalty": (1, 3.0)},
    "stops": {"max_time": 0.0, "stop_strings": ["red"]},
    "output": {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "assistants": {"prompt_lookup_num_tokens": 3, "guidance_scale": 2.0, "renormalize_logits": True},
}


@pytest.fixture(scope="module")
def backbone():
    model, processor = tiny_llava(4)
    # A random model never says EOS; words that it does say close its answers here.
    model.generation_config.eos_token_id = [2, 31, 34]
    return model, processor, batch(processor, [one for one in QUESTIONS if one[1]])


@pytest.fixture
def changed(backbone):
    """The model with other generation defaults while the test lasts."""
    model, _, _ = backbone
    stored = model.generation_config

    def change(**defaults):
        model.generation_config = copy.deepcopy(stored)
        for name, value in defaults.items():
            setattr(model.generation_config, name, value)
        return model

    yield change
    model.generation_config = stored


def by_hand(model, inputs, ends) -> list[list[int]]:
    """The whole sequence anew for every token; never a visual placeholder; up to and with the end token."""
    grown, answers = dict(inputs), [[] for _ in inputs["input_ids"]]
    for _ in range(TOKENS):
        positions = (grown["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits_BV = model(**grown, position_ids=positions, use_cache=False).logits[:, -1]
        logits_BV[:, VISUAL_ID] = -torch.inf
        chosen_B = logits_BV.argmax(-1)
        for row, token in enumerate(chosen_B.tolist()):
            if not answers[row] or answers[row][-1] not in ends:
                answers[row].append(token)
        grown["input_ids"] = torch.cat((grown["input_ids"], chosen_B[:, None]), 1)
        ones = torch.ones_like(chosen_B[:, None])
        grown["attention_mask"] = torch.cat((grown["attention_mask"], ones), 1)
    return answers


def answers_of(model, inputs) -> list[list[int]]:
    new_BA = generate_greedily(model, inputs, TOKENS)[:, inputs["input_ids"].shape[1] :]
    return [row[own].tolist() for row, own in zip(new_BA, in_answer(new_BA, model), strict=True)]


@pytest.mark.parametrize("name", DEFAULTS)
def test_it_is_argmax_whatever_the_checkpoint_asks_for(name, backbone, changed, caplog) -> None:
    model, _, inputs = backbone
    expected = by_hand(model, inputs, {2, 31, 34})
    assert len({len(one) for one in expected}) > 1, "answers of one length would test little"
    changed(**DEFAULTS[name])
    before = model.generation_config.to_dict()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        assert answers_of(model, inputs) == expected
    assert not caplog.records
    assert model.generation_config.to_dict() == before


def test_labels_and_evaluation_are_the_same_decoding(backbone, changed) -> None:
    """What is certified as the same answer is what is measured."""
    _, processor, inputs = backbone
    model = changed(repetition_penalty=1.5, min_length=90, no_repeat_ngram_size=2)
    grown, mask_BN = greedy_answers(model, inputs, TOKENS)
    labels = [
        processor.tokenizer.decode(grown["input_ids"][row][mask_BN[row]], skip_special_tokens=True)
        for row in range(len(mask_BN))
    ]
    pipeline = Pipeline(model, processor, get_template("chat", processor), max_new_tokens=TOKENS)
    ids = tuple(str(row) for row in range(len(mask_BN)))
    asked = Batch(0, ids, dict(inputs), inputs["attention_mask"].sum(1))
    given = answer(pipeline, asked, VisualExit())
    assert [one.prediction for one in given] == labels
    assert [one.num_new_tokens for one in given] == mask_BN.sum(1).tolist()


def test_a_visual_placeholder_is_never_an_answer(backbone) -> None:
    model, _, inputs = backbone
    with torch.no_grad():
        kept = model.lm_head.weight[VISUAL_ID].clone()
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1].mean(0)
        model.lm_head.weight[VISUAL_ID] = 100 * hidden
        try:
            assert bool((model(**inputs).logits[:, -1].argmax(-1) == VISUAL_ID).any())
            assert not any(VISUAL_ID in one for one in answers_of(model, inputs))
        finally:
            model.lm_head.weight[VISUAL_ID] = kept


def test_a_harness_may_ask_for_another_decoding(backbone) -> None:
    model, _, inputs = backbone
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [
            generate_greedily(model, inputs, TOKENS, do_sample=True, temperature=5.0).tolist()
            for _ in range(3)
        ]
    assert len({str(one) for one in drawn}) > 1


def test_end_tokens_make_another_run_and_other_defaults_do_not(backbone, changed, tmp_path) -> None:
    model, processor, _ = backbone
    data = write_mini_gqa(tmp_path / "gqa", questions=4, images=2)
    benchmark = get_benchmark("gqa")
    questions = benchmark.load(data)
    config = EvalConfig(
        model=BackboneConfig(path="tiny"),
        benchmark="gqa",
        data=data,
        output=tmp_path / "out",
        timing_batches=0,
    )
    pipeline = Pipeline(model, processor, get_template("chat", processor), max_new_tokens=4)

    def run():
        return run_policies(pipeline, benchmark, questions, parse_policies(["never"]), config)

    teacher = Teacher(model, processor, TeacherConfig(template="chat"))
    made = Manifest(
        fingerprint=teacher.fingerprint("d"), num_samples=1, shard_size=1, num_layers=4, feature_size=64
    )
    TraceStore.create(tmp_path / "t", made)
    first = run()[0].answers
    assert decoding_identity(model) == "greedy, ends 2,31,34, pad 0"
    changed(repetition_penalty=1.5, min_length=90)
    assert run()[0].answers == first
    TraceStore.open(tmp_path / "t").check(teacher.fingerprint("d"))
    for other in ({"eos_token_id": 2}, {"pad_token_id": 1}):
        changed(**other)
        with pytest.raises(ConfigError, match="another decoding: 'greedy, ends 2,31,34, pad 0', now"):
            run()
        with pytest.raises(CheckpointError, match="decoding: stored 'greedy, ends 2,31,34, pad 0'"):
            TraceStore.open(tmp_path / "t").check(teacher.fingerprint("d"))
    # traces that do not say how they were decoded were decoded like this
    record = json.loads((tmp_path / "t" / "manifest.json").read_text())
    del record["fingerprint"]["decoding"]
    (tmp_path / "t" / "manifest.json").write_text(json.dumps(record))
    TraceStore.open(tmp_path / "t").check(teacher.fingerprint("d"))


def test_a_measurement_gets_its_tokens_without_a_word(backbone, caplog) -> None:
    """Timings make every row generate alike, whatever it says."""
    model, _, inputs = backbone
    with caplog.at_level(logging.WARNING, logger="transformers"):
        made = generate_greedily(model, inputs, TOKENS, min_new_tokens=TOKENS)
    assert made.shape[1] == inputs["input_ids"].shape[1] + TOKENS
    assert not torch.isin(made[:, -TOKENS:], torch.tensor([2, 31, 34])).any()
    assert not caplog.records

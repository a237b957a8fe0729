"""What the plug-ins share: a harness's arguments, lengths, sampling, stop texts."""

from __future__ import annotations

import pytest

from dyvte.errors import ConfigError
from dyvte.plugins.answering import cut, generation_arguments, plugin_config, stop_texts


def test_arguments_of_a_harness_are_checked_like_a_configuration():
    config = plugin_config("--model_args", "some/model", policy="fixed:3", batch_size=4, device=None)
    assert (config.model.path, config.policy, config.reduction) == ("some/model", "fixed:3", "none")
    assert (config.batch_size, config.model.image_padding) == (4, "auto")
    with pytest.raises(ConfigError, match=r"--model_args: unknown key 'polcy'; did you mean 'policy'"):
        plugin_config("--model_args", "some/model", polcy="never")
    with pytest.raises(ConfigError, match="batch_size: expected int, found '4'"):
        plugin_config("--model_args", "some/model", batch_size="4")


@pytest.mark.parametrize(
    ("given", "samples", "tokens"),
    [
        ({}, False, 1024),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
            False,
            16,
        ),
        ({"temperature": 0.0, "do_sample": True}, False, 1024),
        ({"temperature": 0.7, "do_sample": False}, False, 1024),
        ({"temperature": 0.7, "top_p": 0.9}, True, 1024),
        ({"do_sample": True}, True, 1024),
    ],
)
def test_generation_arguments(given, samples, tokens):
    arguments = generation_arguments(given, 1024)
    assert (arguments.get("do_sample", False), arguments["max_new_tokens"]) == (samples, tokens)
    if samples:
        assert arguments["temperature"] == given.get("temperature", 1.0)
        assert arguments["top_p"] == given.get("top_p")
    else:
        assert arguments == {"max_new_tokens": tokens}


def test_generation_arguments_that_cannot_be_followed():
    with pytest.raises(ConfigError, match="num_beams=4"):
        generation_arguments({"num_beams": 4}, 16)
    with pytest.raises(ConfigError, match="at least 1"):
        generation_arguments({"max_new_tokens": -3}, 16)
    with pytest.warns(UserWarning, match="image_aspect_ratio, penalty_alpha"):
        generation_arguments({"penalty_alpha": 1, "image_aspect_ratio": "pad"}, 16)


def test_an_answer_ends_before_the_first_stop_text():
    ends = stop_texts({"until": ["\n\n", "", "ASS"]})
    assert ends == ("\n\n", "ASS")
    assert cut("red ASSISTANT: x\n\ny", ends) == "red "
    assert cut("red\nblue", ends) == "red\nblue"
    assert stop_texts({"until": "stop"}) == ("stop",)
    assert stop_texts({"until": None}) == stop_texts({}) == ()

"""Pieces of an answer add up to its text; a stop text never shows, not even its beginning."""

from __future__ import annotations

import random

import pytest

from dyvte.serving.text import AnswerText


class Characters:
    """A tokenizer of bytes: half a character decodes to the replacement sign."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode("utf-8", "replace")


def pieces(text, stops=(), step=1):
    tokens, answer, shown = list(text.encode()), AnswerText(Characters(), stops), []
    for count in range(step, len(tokens) + step, step):
        shown.append(answer.more(tokens[:count], is_last=count >= len(tokens)))
        if answer.is_stopped:
            break
    return shown, answer.is_stopped


@pytest.mark.parametrize("step", [1, 2, 5])
def test_pieces_are_the_text_without_outer_white_space(step):
    for text in (" a green  square \n", "你好, wörld 🙂!", "", "   ", "x"):
        shown, stopped = pieces(text, step=step)
        assert "".join(shown) == text.strip()
        assert not stopped
        assert not any("\ufffd" in piece for piece in shown)


def test_a_stop_text_ends_the_answer_and_is_not_shown():
    random.seed(0)
    for _ in range(300):
        text = "".join(random.choices("ab\n", k=12))
        stops = ["".join(random.choices("ab\n", k=random.randint(1, 3))) for _ in range(2)]
        expected = text
        for size in range(1, len(text) + 1):  # at the first token that completes one, the earliest counts
            if ends := [text[:size].find(stop) for stop in stops if stop in text[:size]]:
                expected = text[: min(ends)]
                break
        shown, stopped = pieces(text, stops)
        assert stopped == bool(ends)
        assert "".join(shown) == expected.strip()


def test_what_may_begin_a_stop_text_is_held_back():
    answer, tokens = AnswerText(Characters(), ["###"]), list(b"red ## blue ###x")
    assert answer.more(tokens[:5]) == "red"
    assert answer.more(tokens[:6]) == ""
    assert answer.more(tokens[:8]) == " ## b"
    assert answer.more(tokens[:15]) == "lue"
    assert answer.is_stopped

"""A conversation in the terminal, line by line."""

from __future__ import annotations

import pytest

from dyvte.serving.asking import ask
from dyvte.serving.chat import Chat
from dyvte.serving.jobs import Conversation
from dyvte.serving.schedules import ScheduleWish
from tests.helpers.models import random_image


@pytest.fixture
def chat(answerer, tmp_path):
    """A conversation, what it wrote, and two images."""
    for seed in (1, 2):
        random_image(seed).save(tmp_path / f"{seed}.png")
    written = []
    made = Chat(answerer, written.append)
    made.folder, made.written = tmp_path, written

    def say(line):
        written.clear()
        made.take(line)
        return "".join(written)

    made.say = say
    return made


def test_questions_images_and_policies(chat, answerer):
    first = [random_image(1)]
    chat.say(f"/image {chat.folder / '1.png'}")
    shown = chat.say("what color ?")
    known = ask(answerer, Conversation("what color ?", [first]))
    assert shown.startswith(f"{known.texts[0]}\n[gates@0.5 | ")
    history = [("what color ?", known.texts[0])]
    second = ask(answerer, Conversation("how many ?", [first, []], history))
    assert chat.say("how many ?").startswith(f"{second.texts[0]}\n")
    # The last question again, under another schedule; then a new image.
    assert "from now on: freeze:1:3" in chat.say("/policy freeze:1:3")
    schedule = answerer.menu.choose(ScheduleWish(policy="freeze:1:3"))
    again = ask(answerer, Conversation("how many ?", [first, []], history), schedule=schedule)
    shown = chat.say("/again")
    assert shown.startswith(f"{again.texts[0]}\n[freeze:1:3 | ")
    assert "█▒▒·" in shown
    history.append(("how many ?", again.texts[0]))
    chat.say(f"/image {chat.folder / '2.png'}")
    third = ask(answerer, Conversation("what ?", [first, [], [random_image(2)]], history), schedule=schedule)
    assert chat.say("what ?").startswith(f"{third.texts[0]}\n")
    chat.say("/new")
    assert "| no image |" in chat.say("how many ?")


def test_what_is_wrong_is_said_and_the_conversation_goes_on(chat):
    assert "nothing has been asked yet" in chat.say("/again")
    assert "missing image" in chat.say("/image nowhere.png")
    assert "exit layer 9" in chat.say("/policy fixed:9")
    assert "probability in 0..1" in chat.say("/policy gates@2")
    assert "from now on: gates@0.7" in chat.say("/policy gates@0.7")
    assert "/image FILE" in chat.say("/help")
    assert "/image FILE" in chat.say("/")
    assert "image placeholder" in chat.say("what <image> ?")
    assert chat.say("   ") == ""
    assert "| no image |" in chat.say("how many ?")
    assert not chat.is_over
    chat.say("/quit")
    assert chat.is_over

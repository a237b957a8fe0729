"""A conversation about images in the terminal: lines in, answers and their layers out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dyvte.data import load_image
from dyvte.errors import ConfigError, DyvteError
from dyvte.serving.answerer import Answerer
from dyvte.serving.asking import ask
from dyvte.serving.jobs import Conversation
from dyvte.serving.schedules import ScheduleWish
from dyvte.serving.terminal import layers_line

HELP = "commands: /image FILE, /policy POLICY, /again, /new, /quit; anything else is a question\n"


class Chat:
    """A conversation and the commands that steer it.

    Parameters
    ----------
    answerer
        The model.
    write
        Takes pieces of text for the terminal.
    """

    def __init__(self, answerer: Answerer, write: Callable[[str], Any]) -> None:
        self.answerer, self.write = answerer, write
        self.schedule = answerer.menu.own
        self.is_over = False
        self._forget()

    def _forget(self) -> None:
        self._history: list[tuple[str, str]] = []
        self._images: list[list[Any]] = []
        self._shown: list[Any] = []

    def show(self, path: Path) -> None:
        """An image for the next question.

        Raises
        ------
        DataError
            If it cannot be read.
        """
        self._shown.append(load_image(path))

    def take(self, line: str) -> None:
        """A line that was typed; what is wrong with it is written, and the conversation goes on."""
        line = line.strip()
        try:
            if line.startswith("/"):
                self._command(*line[1:].split(maxsplit=1))
            elif line:
                self._ask(line)
        except DyvteError as error:
            self.write(f"{error}\n")

    def _command(self, name: str = "", argument: str = "") -> None:
        if name == "image" and argument:
            self.show(Path(argument).expanduser())
            self.write(f"the next question is about {argument}\n")
        elif name == "policy" and argument:
            self.schedule = self.answerer.menu.choose(_wish(argument))
            self.write(f"from now on: {self.schedule.text}\n")
        elif name == "again":
            self._again()
        elif name == "new":
            self._forget()
            self.write("forgotten\n")
        elif name in ("quit", "exit"):
            self.is_over = True
        else:
            self.write(HELP)

    def _ask(self, question: str) -> None:
        images = [*self._images, self._shown]
        conversation = Conversation(question, images, self._history)
        answer = ask(self.answerer, conversation, schedule=self.schedule, show=self.write)
        self.write(f"\n[{layers_line(answer)}]\n")
        # A template needs some text in every answer that it repeats.
        self._history.append((question, answer.texts[0] or "(no answer)"))
        self._images, self._shown = images, []

    def _again(self) -> None:
        if not self._history:
            raise ConfigError("nothing has been asked yet")
        question, _ = self._history.pop()
        self._shown = self._images.pop()
        self._ask(question)


def _wish(text: str) -> ScheduleWish:
    """The wish that a policy's short name says: also ``gates@0.7``."""
    name, at, threshold = text.partition("@")
    if name != "gates" or not at:
        return ScheduleWish(policy=text)
    try:
        value = float(threshold)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ConfigError(f"policy {text}: expected gates@THRESHOLD with a probability in 0..1")
    return ScheduleWish(threshold=value)

"""Talk with a backbone about images, in the terminal.

What is typed is a question; the answer comes as it is generated, then a line that says where the visual
tokens left. Lines that begin with / are commands:
  /image FILE     show another image with the next question
  /policy POLICY  another schedule from now on: never, fixed:16, freeze:8:24, gates, gates@0.7 ...
  /again          ask the last question anew, under the schedule that holds now
  /new            forget the conversation
  /quit           leave (or Ctrl-D)
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """
dyvte chat checkpoints/tiny-llava --image scene.png --policy fixed:6
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte chat``."""
    from dyvte.commands.options import add_settings
    from dyvte.serving.config import AnswerConfig

    parser.add_argument("model", metavar="MODEL", help="the backbone: folder or hub id")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="an image to begin with; several",
    )
    add_settings(parser, AnswerConfig, omit=("model.path",))


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves."""
    import json
    import sys

    from dyvte.commands.options import config_from
    from dyvte.serving.answerer import Answerer
    from dyvte.serving.chat import Chat
    from dyvte.serving.config import AnswerConfig

    config = config_from(AnswerConfig, args, before=[f"model={json.dumps(args.model)}"])
    chat = Chat(Answerer.open(config), lambda text: print(text, end="", flush=True))
    for image in args.image:
        chat.show(image)
    is_terminal = sys.stdin.isatty()
    while not chat.is_over:
        if is_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        chat.take(line)
    return 0

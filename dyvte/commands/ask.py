"""Ask one question about an image: the answer on stdout, where the visual tokens left on stderr.

The answer is greedy, as everywhere. --policy says when the visual tokens freeze and leave. IMAGE may be
"none" for a question about text alone; several questions are asked one after the other about the same image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """
dyvte ask checkpoints/tiny-llava scene.png "What color is the star?" --policy fixed:6
dyvte ask llava-hf/llava-1.5-7b-hf photo.jpg "What is this?" --policy gates:runs/7b/gates
"""

NO_IMAGE = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte ask``."""
    from dyvte.commands.options import add_settings
    from dyvte.serving.config import AnswerConfig

    parser.add_argument("model", metavar="MODEL", help="the backbone: folder or hub id")
    parser.add_argument("image", metavar="IMAGE", help="an image file, or none")
    parser.add_argument("question", metavar="QUESTION", help="what to ask about it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_settings(parser, AnswerConfig, omit=("model.path",))


def run(args: argparse.Namespace) -> int:
    """Answer, and say where the visual tokens left."""
    import json
    import sys
    from dataclasses import asdict

    from dyvte.commands.options import config_from
    from dyvte.data import load_image
    from dyvte.serving.answerer import Answerer
    from dyvte.serving.asking import ask
    from dyvte.serving.config import AnswerConfig
    from dyvte.serving.jobs import Conversation
    from dyvte.serving.terminal import layers_line

    config = config_from(AnswerConfig, args, before=[f"model={json.dumps(args.model)}"])
    images = [] if args.image == NO_IMAGE else [load_image(Path(args.image))]
    answerer = Answerer.open(config)
    answer = ask(answerer, Conversation(args.question, [images]))
    if args.json:
        print(json.dumps({"answer": answer.texts[0], **asdict(answer)}, ensure_ascii=False))
        return 0
    print(answer.texts[0])
    print(layers_line(answer), file=sys.stderr)
    return 0

"""Serve a backbone over HTTP the way OpenAI's API does, with a schedule of visual tokens for every request.

POST /v1/chat/completions (also streaming), GET /v1/models, /health and /metrics; a page for people at /.
Requests that wait are answered together, each leaving at its own layers: a request may say
"visual_exit": {"policy": "fixed:16"}, {"threshold": 0.7}, {"max_risk": 0.02} or {"budget": 0.5}, and every
reply says what became of its visual tokens. Only this machine can reach the server unless --host says so.
"""

from __future__ import annotations

import argparse

EXAMPLES = """
dyvte serve checkpoints/tiny-llava --policy fixed:6 --port 8000
dyvte serve llava-hf/llava-1.5-7b-hf --policy gates:runs/7b/gates
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte serve``: the settings of its configuration."""
    from dyvte.commands.options import add_settings
    from dyvte.serving.config import ServeConfig

    parser.add_argument("model", metavar="MODEL", help="the backbone: folder or hub id")
    add_settings(parser, ServeConfig, omit=("model.path",))


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    import json

    from dyvte.commands.options import config_from
    from dyvte.serving.config import ServeConfig
    from dyvte.serving.server import serve

    config = config_from(ServeConfig, args, before=[f"model={json.dumps(args.model)}"])
    serve(config, say=lambda line: print(line, flush=True))
    return 0

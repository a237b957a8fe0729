"""VLMEvalKit's model ``DyvteVLM``: any supported backbone with a policy and reductions of ``dyvte eval``.

VLMEvalKit is run from a checkout and has no entry points; nothing in it needs a change. From its folder::

    python -m dyvte.plugins.vlmevalkit run.py --config models.json --work-dir out

runs its unmodified ``run.py`` with the class in place, so that a configuration may say
``{"model": {"name": {"class": "DyvteVLM", "pretrained": "PATH", "policy": "fixed:16"}}, "data": ...}``. In
Python, :func:`register` does the same by name.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import vlmeval.vlm
from vlmeval.vlm.base import BaseModel

from dyvte.data import load_image
from dyvte.data.defects import named
from dyvte.errors import DataError
from dyvte.evaluation.run_log import exit_row
from dyvte.plugins.answering import Answering, Request, plugin_config, request_of
from dyvte.readers.videos import Video, read_frames


class DyvteVLM(BaseModel):
    """The model as VLMEvalKit knows it; it asks one question at a time.

    Parameters
    ----------
    pretrained
        Backbone: folder or hub id.
    arguments
        The fields of `PluginConfig`: policy, reduction, image_padding, max_new_tokens, exits, ...
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    allowed_types = ("text", "image", "video")

    def __init__(self, pretrained: str, **arguments: Any) -> None:
        super().__init__()
        config = plugin_config("DyvteVLM", pretrained, **arguments)
        self.answering = Answering(config)
        self._num_asked = 0
        if config.exits is not None:
            config.exits.parent.mkdir(parents=True, exist_ok=True)
            config.exits.write_text("", encoding="utf-8")

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """The data set's own prompts are asked."""
        return False

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The greedy answer to one message."""
        identity, frames = str(self._num_asked), self.answering.config.num_frames
        request = request_of(identity, lambda: as_request(identity, message, frames))
        self._num_asked += 1
        (one,) = self.answering.answer([request])
        if (path := self.answering.config.exits) is not None:
            shown = [Path(part["value"]).name for part in message if part["type"] != "text"]
            row = {"dataset": dataset, "question": request.text, "shown": shown, **exit_row(one)}
            with path.open("a", encoding="utf-8", newline="\n") as stream:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        return one.prediction


def as_request(identity: str, message: Sequence[Mapping[str, Any]], num_frames: int) -> Request:
    """A message of VLMEvalKit as one prompt: images go before the question, as in LLaVA; texts are joined by
    line breaks, as its own ``message_to_promptimg`` does.

    Raises
    ------
    DataError
        Images beside a video, or several videos.
    """
    text = "\n".join(part["value"] for part in message if part["type"] == "text")
    shown = [part for part in message if part["type"] != "text"]
    if all(part["type"] == "image" for part in shown):
        with named(f"request {identity}"):
            return Request(identity, text, tuple(load_image(Path(part["value"])) for part in shown))
    if len(shown) > 1 or shown[0]["type"] != "video":
        kinds = ", ".join(part["type"] for part in shown)
        raise DataError(f"request {identity}: expected images or one video, found {kinds}")
    frames = read_frames(Video(Path(shown[0]["value"])), num_frames)
    return Request(identity, text, tuple(frames), is_video=True)


def register(name: str, pretrained: str, **arguments: Any) -> None:
    """Make ``name`` a model of VLMEvalKit, built when it is first asked; for `DyvteVLM`'s arguments."""
    from vlmeval.config import supported_VLM

    supported_VLM[name] = partial(DyvteVLM, pretrained, **arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run VLMEvalKit's ``run.py`` (the first argument) with ``DyvteVLM`` among its models."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or not Path(arguments[0]).is_file():
        sys.exit("usage: python -m dyvte.plugins.vlmevalkit PATH/TO/VLMEvalKit/run.py [its options]")
    vlmeval.vlm.DyvteVLM = DyvteVLM
    sys.argv = list(arguments)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()

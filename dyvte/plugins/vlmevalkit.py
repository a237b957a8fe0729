"""VLMEvalKit's model ``DyvteVLM``: any supported backbone with a policy and reductions of ``dyvte eval``.

VLMEvalKit has no entry points; nothing in it needs a change. With the package ``ms-vlmeval`` installed::

    python -m dyvte.plugins.vlmevalkit --config models.json --work-dir out

runs its unmodified ``vlmeval.run`` with the class in place, so that a configuration may say
``{"model": {"name": {"class": "DyvteVLM", "pretrained": "PATH", "policy": "fixed:16"}}, "data": ...}``. From
a checkout, the path of its ``run.py`` goes before the options. In Python, :func:`register` does the same by
name.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import vlmeval.vlm
from vlmeval.vlm.base import BaseModel

from dyvte.data import load_image
from dyvte.data.defects import named
from dyvte.errors import DataError
from dyvte.plugins.answering import Answering, Request, plugin_config, request_of
from dyvte.plugins.exits_file import ExitsFile
from dyvte.readers.videos import Video, read_frames


class DyvteVLM(BaseModel):
    """The model as VLMEvalKit knows it; it asks one question at a time.

    Parameters
    ----------
    pretrained
        Backbone: folder or hub id.
    use_vllm
        What ``run.py --use-vllm`` passes, and VLMEvalKit itself for names that hold Qwen2-VL or Llama-4. The
        answers are transformers' all the same.
    arguments
        The fields of `PluginConfig`: policy, reduction, image_padding, max_new_tokens, exits, ...
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    allowed_types = ("text", "image", "video")

    def __init__(self, pretrained: str, use_vllm: bool = False, **arguments: Any) -> None:
        super().__init__()
        if use_vllm:
            warnings.warn("use_vllm changes nothing: DyvteVLM answers with transformers", stacklevel=2)
        config = plugin_config("DyvteVLM", pretrained, **arguments)
        self.answering = Answering(config)
        self._index: Any = None
        self._num_unnamed = 0
        self._exits_file = None
        if config.exits is not None:
            settings = {
                "pretrained": str(config.model.path),
                "policy": config.policy,
                "reduction": self.answering.policy.reduction,
            }
            key = ("dataset", "index")
            self._exits_file = ExitsFile(config.exits, int(os.environ.get("RANK", 0)), key, settings)

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Whether `build_prompt` is to be called: where it can pass the line on to the data set."""
        return getattr(self._asked, "dataset_name", None) == dataset is not None

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, Any]]:
        """The data set's own prompt; ours is only to learn which row is asked next."""
        message = self._asked.build_prompt(line)
        self._index = _plain(line["index"])
        return message

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The greedy answer to one message."""
        index, self._index = self._index, None
        identity, frames = self._name(dataset, index), self.answering.config.num_frames
        request = request_of(identity, lambda: as_request(identity, message, frames))
        (one,) = self.answering.answer([request])
        if self._exits_file is not None:
            shown = [Path(part["value"]).name for part in message if part["type"] != "text"]
            self._exits_file.add(one, dataset=dataset, index=index, question=request.text, shown=shown)
        return one.prediction

    @property
    def _asked(self) -> Any:
        """The image data set that is being asked: VLMEvalKit hands its model a method of it."""
        return getattr(self.dump_image_func, "__self__", None)

    def _name(self, dataset: str | None, index: Any) -> str:
        """By what an oracle policy knows a question."""
        if index is not None:
            return f"{dataset}/{index}"
        self._num_unnamed += 1
        return f"{dataset}/unnamed-{self._num_unnamed}"


def as_request(identity: str, message: Sequence[Mapping[str, Any]], num_frames: int) -> Request:
    """A message of VLMEvalKit as one prompt: images go before the question, as in LLaVA; texts are joined by
    line breaks, as its own ``message_to_promptimg`` does.

    Parameters
    ----------
    identity
        The request's id.
    message
        As the harness gives it.
    num_frames
        Frames sampled from a video.

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
    """Make ``name`` a model of VLMEvalKit, built when it is first asked; for `DyvteVLM`'s arguments.

    Parameters
    ----------
    name
        Of the model.
    pretrained
        Backbone: folder or hub id.
    **arguments
        Fields of `PluginConfig`.
    """
    from vlmeval.config import supported_VLM

    supported_VLM[name] = partial(DyvteVLM, pretrained, **arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run VLMEvalKit with ``DyvteVLM`` among its models: ``vlmeval.run``, or a checkout's ``run.py`` where
    that is the first argument."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    script = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if not arguments or (script is not None and not Path(script).is_file()):
        sys.exit("usage: python -m dyvte.plugins.vlmevalkit [PATH/TO/VLMEvalKit/run.py] --config FILE ...")
    if script is None and importlib.util.find_spec("vlmeval.run") is None:
        sys.exit(
            "this VLMEvalKit has no vlmeval.run: it is a checkout, whose run.py must be the first argument; "
            "the package is ms-vlmeval"
        )
    vlmeval.vlm.DyvteVLM = DyvteVLM
    if script is None:
        sys.argv[1:] = arguments
        runpy.run_module("vlmeval.run", run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(script, run_name="__main__")


def _plain(index: Any) -> Any:
    """An index of pandas as JSON knows it."""
    return index.item() if hasattr(index, "item") else index


if __name__ == "__main__":
    main()

"""lmms-eval's model ``dyvte``: any supported backbone with a policy and reductions of ``dyvte eval``.

``lmms-eval --model dyvte --model_args pretrained=PATH,policy=fixed:16,reduction=none --tasks ...``. Further
model arguments are the fields of `PluginConfig`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger

from dyvte.data import load_image
from dyvte.data.defects import named
from dyvte.data.images import as_rgb
from dyvte.distributed import launch
from dyvte.errors import ConfigError, DataError
from dyvte.evaluation.generation import plan_batches
from dyvte.evaluation.run_log import Answer, exit_row
from dyvte.plugins.answering import Answering, Request, plugin_config, request_of
from dyvte.plugins.exits_file import own_file
from dyvte.progress import progress
from dyvte.readers.videos import Video, read_frames


class DyvteChat(lmms):
    """The model as lmms-eval knows it; prompts, images and batches are those of ``dyvte eval``."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit():
            raise ConfigError(f"--batch_size {batch_size}: expected a number, batches are not sized by trial")
        config = plugin_config("--model_args", pretrained, **{**arguments, "batch_size": int(batch_size)})
        self._rank, self._world_size, local_rank = launch()
        self._answering: Answering | None = Answering(config, local_rank)
        self._exits_file = _open_anew(config.exits, self._rank)

    @property
    def answering(self) -> Answering:
        """The backbone and how it is asked; gone once lmms-eval has cleaned up."""
        if self._answering is None:
            raise ConfigError("this model was cleaned up: make a new one")
        return self._answering

    @property
    def model(self) -> torch.nn.Module:
        """The backbone."""
        return self.answering.pipeline.model

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.answering.pipeline.device

    @property
    def batch_size(self) -> int:
        """Requests in a batch, at most."""
        return self.answering.config.batch_size

    def clean(self) -> None:
        """Let go of the backbone, when lmms-eval has no more requests."""
        self._answering = None
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests. Those of one task with the same generation arguments are
        batched."""
        answers: dict[int, Answer] = {}
        with progress(len(requests), "dyvte", "answer", shown=self.rank == 0) as advance:
            for rows in _alike(requests):
                for plan in self._plan([requests[i].args[0] for i in rows]):
                    batch = [rows[i] for i in plan]
                    asked = [self._request(requests[i]) for i in batch]
                    given = self.answering.answer(asked, requests[batch[0]].args[2])
                    answers.update(zip(batch, given, strict=True))
                    advance(len(batch))
        ordered = [answers[i] for i in range(len(requests))]
        self._keep(requests, ordered)
        return [_result(one) for one in ordered]

    def _plan(self, contexts: Sequence[str]) -> list[list[int]]:
        """Batches of requests: neighbours in prompt length, longest first; where images are shared, as they
        were asked, which is image by image as a rule."""
        if self.answering.pipeline.images is None:
            return plan_batches(self.answering.pipeline, contexts, self.batch_size)
        order = list(range(len(contexts)))
        return [order[start : start + self.batch_size] for start in order[:: self.batch_size]]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not served."""
        raise NotImplementedError("dyvte answers questions (generate_until); it gives no likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not served."""
        raise NotImplementedError("dyvte answers in one round (generate_until)")

    def _request(self, instance: Instance) -> Request:
        _, doc_to_messages, _, doc_id, task, split = instance.args
        doc = self.task_dict[task][split][doc_id]
        known_by = doc["id"] if isinstance(doc, Mapping) and "id" in doc else f"{task}/{doc_id}"
        frames = self.answering.config.num_frames
        return request_of(str(known_by), lambda: as_request(str(known_by), doc_to_messages(doc), frames))

    def _keep(self, requests: Sequence[Instance], answers: Sequence[Answer]) -> None:
        """Write the exits; say what the policy came to."""
        seeing = [one for one in answers if one.exit_layer >= 0]
        named = self.answering.policy
        mean = f"{sum(one.exit_layer for one in seeing) / len(seeing):.3f}" if seeing else "none"
        if any(one.updated_layers < one.exit_layer for one in seeing):
            mean += f", updated in {sum(one.updated_layers for one in seeing) / len(seeing):.3f},"
        unasked = sum(bool(one.problem) for one in answers)
        others = "the others have no image" + (f", or could not be asked: {unasked}" if unasked else "")
        logger.info(
            f"dyvte: policy {named.name}, reduction {named.reduction}: mean exit layer {mean} over "
            f"{len(seeing)} of {len(answers)} requests ({others})"
        )
        if self._exits_file is None:
            return
        with self._exits_file.open("a", encoding="utf-8", newline="\n") as stream:
            for request, one in zip(requests, answers, strict=True):
                _, _, _, doc_id, task, _ = request.args
                row = {"task": task, "doc_id": doc_id, **exit_row(one)}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def as_request(identity: str, messages: Sequence[Mapping[str, Any]], num_frames: int) -> Request:
    """A conversation of lmms-eval as one prompt; images go before its first question, as in LLaVA.

    Parameters
    ----------
    identity
        The request's id.
    messages
        As the harness gives it.
    num_frames
        Frames sampled from a video.

    Raises
    ------
    DataError
        A system message, audio, images beside a video, or a conversation that is not question and answer in
        turn.
    """
    visuals = [part for message in messages for part in message["content"] if part["type"] != "text"]
    kinds = {part["type"] for part in visuals}
    if not kinds <= {"image", "video"} or len(kinds) > 1 or (kinds == {"video"} and len(visuals) > 1):
        raise DataError(f"{identity}: expected images or one video, found {', '.join(sorted(kinds))}")
    roles = [message["role"] for message in messages]
    if roles != [("user", "assistant")[i % 2] for i in range(len(roles))] or len(roles) % 2 == 0:
        raise DataError(f"{identity}: expected user and assistant in turn, user last; found {roles}")
    texts = [
        "\n".join(part["text"] for part in message["content"] if part["type"] == "text")
        for message in messages
    ]
    shown = (
        read_frames(Video(Path(visuals[0]["url"])), num_frames)
        if kinds == {"video"}
        else [_picture(part["url"], identity) for part in visuals]
    )
    history = tuple(zip(texts[0:-1:2], texts[1:-1:2], strict=True))
    return Request(identity, texts[-1], tuple(shown), kinds == {"video"}, history)


def _picture(image: Any, identity: str) -> Any:
    """An RGB PIL image from a PIL image or a file's path."""
    with named(f"request {identity}"):
        return load_image(Path(image)) if isinstance(image, str | Path) else as_rgb(image)


def _alike(requests: Sequence[Instance]) -> list[list[int]]:
    """Indices of the requests of one task with the same generation arguments."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        _, _, generation, _, task, _ = request.args
        groups.setdefault(json.dumps([task, generation], sort_keys=True, default=repr), []).append(index)
    return list(groups.values())


def _open_anew(path: Path | None, rank: int) -> Path | None:
    """The file of this process, emptied."""
    if path is None:
        return None
    own = own_file(path, rank)
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("", encoding="utf-8")
    return own


def _result(one: Answer) -> GenerationResult:
    counts = TokenCounts(input_tokens=one.num_visual + one.num_text, output_tokens=one.num_new_tokens)
    return GenerationResult(text=one.prediction, token_counts=counts)

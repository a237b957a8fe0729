"""What the plug-ins share: settings from a harness's arguments, requests answered as ``dyvte eval`` does.

Nothing of a harness is imported here.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dyvte.backbones import takes_videos
from dyvte.backbones.sizes import decoder_shape
from dyvte.config import from_dict
from dyvte.data.defects import Defect, Unusable, check_text, is_of_sample, problem_text
from dyvte.distributed import own_device
from dyvte.errors import ConfigError
from dyvte.evaluation.checks import defects_alone, refuse
from dyvte.evaluation.fitting import check_named
from dyvte.evaluation.generation import Batch, GenerationSettings, Pipeline, answer, encode_rendered
from dyvte.evaluation.run_log import Answer
from dyvte.evaluation.runner import load_pipeline
from dyvte.evaluation.settings import NO_REDUCTION, NamedPolicy, parse_policies, with_reductions
from dyvte.runtime import VisualExit

log = logging.getLogger(__name__)
_UNDERSTOOD = ("until", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams")


@dataclass(frozen=True, kw_only=True)
class PluginConfig(GenerationSettings):
    """Arguments of the model in another harness: those of ``dyvte eval`` that concern one model.

    The harness passes ``pretrained`` for ``model``, and its settings beside it.
    """

    batch_size: int = 1
    max_new_tokens: int = 1024
    """Where a task does not say; 1024 is what the harnesses' own models take."""
    policy: str = "never"
    """When visual tokens leave, in the forms of `dyvte.policies.POLICIES`."""
    reduction: str = NO_REDUCTION
    """What is spent on them before, in the forms of `dyvte.reductions`."""
    exits: Path | None = None
    """JSON lines to write: exit layer, gate probabilities and tokens of every request."""


def plugin_config(origin: str, pretrained: Any, **arguments: Any) -> PluginConfig:
    """Settings from a harness's arguments; None stands for the default.

    Parameters
    ----------
    origin
        Of the arguments, for messages.
    pretrained
        Backbone: folder or hub id.
    **arguments
        Fields of `PluginConfig`.

    Raises
    ------
    ConfigError
        An unknown argument (the nearest is named), or a value of another type.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    return from_dict(PluginConfig, {"model": pretrained, **given}, origin=origin)


@dataclass(frozen=True)
class Request:
    """One prompt of a harness.

    Attributes
    ----------
    id : by which an oracle policy knows it; need not be unique.
    text : the last question.
    images : RGB PIL images in the order shown, or a video's frames.
    is_video : whether they are frames.
    history : earlier exchanges (question, answer).
    problem : why it cannot be asked; empty for one that can.
    """

    id: str
    text: str
    images: tuple[Any, ...] = ()
    is_video: bool = False
    history: tuple[tuple[str, str], ...] = ()
    problem: str = ""


def request_of(identity: str, make: Callable[[], Request]) -> Request:
    """A request from what a harness hands over; where that cannot be read, one that says why.

    Parameters
    ----------
    identity
        Its id.
    make
        Reads it.
    """
    try:
        return make()
    except Exception as error:
        if not is_of_sample(error):
            raise
        return Request(identity, "", problem=problem_text(error))


class Answering:
    """A loaded backbone under one policy and its reductions. Nothing stays on the model between calls.

    Requests that cannot be asked are counted over all calls; up to ``max_bad_samples`` of them are answered
    with nothing and logged, one more ends the run.
    """

    def __init__(self, config: PluginConfig, local_rank: int = 0) -> None:
        self.config = config
        self._num_asked = 0
        self._unusable: list[Defect] = []
        self.policy: NamedPolicy = with_reductions(
            parse_policies((config.policy,), config.seed), (config.reduction,)
        )[0]
        self.pipeline: Pipeline = load_pipeline(config, own_device(local_rank), (self.policy,))
        check_named(self.pipeline.model, self.pipeline.processor, (self.policy,))

    @cached_property
    def _exits(self) -> VisualExit:
        return self.policy.exits()

    def answer(
        self, requests: Sequence[Request], generation: Mapping[str, Any] | None = None
    ) -> list[Answer]:
        """Answers in the order of the requests, which form one batch (videos, where shown in a backbone's own
        way, another).

        Parameters
        ----------
        generation
            A harness's generation arguments: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_p``,
            ``top_k``; the answer ends before the first of the texts ``until``.

        Raises
        ------
        DataError
            If more than ``max_bad_samples`` requests cannot be asked; they are named.
        """
        generation = generation or {}
        arguments = generation_arguments(generation, self.config.max_new_tokens)
        answers: dict[int, Answer] = {}
        own_way = takes_videos(self.pipeline.processor)
        self._num_asked += len(requests)
        for as_videos in (False, True):
            rows = [i for i, one in enumerate(requests) if (one.is_video and own_way) == as_videos]
            batch, problems = self._encode([requests[i] for i in rows], as_videos)
            num_layers = decoder_shape(self.pipeline.model.config).num_layers
            for at, problem in problems.items():
                answers[rows[at]] = Answer.unanswered(requests[rows[at]].id, problem, num_layers)
            if batch is not None:
                rows = [row for at, row in enumerate(rows) if at not in problems]
                answers.update(zip(rows, answer(self.pipeline, batch, self._exits, arguments), strict=True))
        ends = stop_texts(generation)
        return [replace(answers[i], prediction=cut(answers[i].prediction, ends)) for i in sorted(answers)]

    def _encode(self, requests: Sequence[Request], as_videos: bool) -> tuple[Batch | None, dict[int, str]]:
        """The batch of those that can be asked, None if there are none; why others cannot, by place."""
        if not requests:
            return None, {}
        try:
            return self._encoded(requests, as_videos), {}
        except Exception as error:
            if not is_of_sample(error):
                raise
            ids = [one.id for one in requests]
            places = [str(place) for place in range(len(ids))]  # ids need not be unique
            found = defects_alone(places, lambda i: self._encoded(requests[i : i + 1], as_videos))
            if not found:
                raise
        problems = {int(one.sample_id): f"{one.field}: {one.problem}" for one in found}
        self._unusable += [replace(one, sample_id=ids[int(one.sample_id)]) for one in found]
        refuse(self._unusable, self._num_asked, max_bad_samples=self.config.max_bad_samples)
        for at, problem in problems.items():
            log.warning("request %s cannot be asked and is answered with nothing: %s", ids[at], problem)
        rest = [one for at, one in enumerate(requests) if at not in problems]
        return (self._encoded(rest, as_videos) if rest else None), problems

    def _encoded(self, requests: Sequence[Request], as_videos: bool) -> Batch:
        for one in requests:
            if one.problem:
                raise Unusable("request", one.problem)
            check_text(one.text, "text")
        rendered = [
            self.pipeline.template.render(
                one.text, has_image=1 if as_videos else len(one.images), history=one.history
            )
            for one in requests
        ]
        images = [one.images for one in requests]
        return encode_rendered(
            self.pipeline, [one.id for one in requests], rendered, images, as_videos=as_videos
        )


def generation_arguments(given: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """What a harness's arguments change in greedy generation. As in the harnesses' own models, a positive
    temperature means sampling unless ``do_sample`` says no.

    Parameters
    ----------
    given
        As a harness gives them.
    max_new_tokens
        Where it does not say.

    Raises
    ------
    ConfigError
        Beam search, or a number of tokens below 1.
    """
    unknown = sorted(given.keys() - set(_UNDERSTOOD))
    if unknown:
        warnings.warn(f"generation arguments that dyvte does not use: {', '.join(unknown)}", stacklevel=2)
    if (beams := given.get("num_beams") or 1) != 1:
        raise ConfigError(f"num_beams={beams}: the plug-in follows one sequence for each prompt; use 1")
    tokens = given.get("max_new_tokens") or max_new_tokens
    if int(tokens) < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, found {tokens}")
    arguments: dict[str, Any] = {"max_new_tokens": int(tokens)}
    temperature = given.get("temperature")
    wanted = given.get("do_sample")
    samples = bool(temperature) if wanted is None else bool(wanted) and temperature != 0
    if samples:
        arguments.update(
            do_sample=True,
            temperature=1.0 if temperature is None else float(temperature),
            top_p=given.get("top_p"),
            top_k=given.get("top_k"),
        )
    return arguments


def stop_texts(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts before which an answer ends."""
    until = given.get("until") or ()
    return (until,) if isinstance(until, str) else tuple(text for text in until if text)


def cut(text: str, ends: Sequence[str]) -> str:
    """The text up to the first of ``ends``."""
    return text[: min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))]

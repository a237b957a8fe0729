"""The model that answers, the schedules it can have, and prompts made of conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from torch import nn

from dyvte.backbones import Backbone, describe, get_template, open_backbone
from dyvte.backbones.greedy import end_tokens
from dyvte.backbones.sizes import DecoderShape, decoder_shape
from dyvte.costs.reductions import visual_factors
from dyvte.costs.visual import visual_share
from dyvte.data.defects import is_of_sample, problem_text
from dyvte.distributed import own_device
from dyvte.evaluation.generation import Batch, Pipeline, encode_rendered
from dyvte.policies.per_row import PerRowPolicy
from dyvte.reductions import NO_REDUCTION, Reduction
from dyvte.runtime import VisualExit
from dyvte.runtime.image_store import ImageStore
from dyvte.serving.config import MEGABYTE, AnswerConfig
from dyvte.serving.errors import RequestError
from dyvte.serving.jobs import Conversation, Decoding, Job
from dyvte.serving.schedules import ScheduleMenu, ServedSchedule


@dataclass(frozen=True)
class Answerer:
    """A loaded backbone that answers under schedules.

    Attributes
    ----------
    pipeline
        Model, processor and template; its ``max_new_tokens`` holds where a request does not say.
    menu
        The schedules that can be had.
    reductions
        What is spent on visual tokens before they leave, in every request.
    backbone, shape
        The model's parts, and its decoder's sizes.
    context
        Tokens that prompt and answer may have together; None: not known.
    ends
        Ids of the tokens that end an answer.
    images
        What the model has made of images so far; None: nothing is kept.
    """

    pipeline: Pipeline
    menu: ScheduleMenu
    reductions: tuple[Reduction, ...]
    backbone: Backbone
    shape: DecoderShape
    context: int | None
    ends: frozenset[int]
    images: ImageStore | None = None

    @cached_property
    def visual_compute(self) -> Callable[[int, tuple[int, ...], tuple[int, ...]], float]:
        """Visual compute of a row, from how many visual tokens it has, and how many of them each layer
        updates, and reads frozen. Remembered: rows of one schedule with as many tokens have the same."""

        @lru_cache(maxsize=4096)
        def of(num_visual: int, visual_L: tuple[int, ...], frozen_L: tuple[int, ...]) -> float:
            factors = visual_factors(self.reductions, self.shape, num_visual)
            frozen_BL = [frozen_L] if any(frozen_L) else None
            return visual_share(self.shape, [visual_L], [num_visual], factors, frozen_BL)

        return of

    @classmethod
    def open(cls, config: AnswerConfig) -> Answerer:
        """Load what a configuration names.

        Raises
        ------
        DyvteError
            If the backbone cannot be loaded, or policy, gates or reductions are not for it.
        """
        menu = ScheduleMenu(config.policy, _text(config.gates), config.reduction)

        def check(model: nn.Module, processor: Any) -> None:
            get_template(config.template, processor)
            menu.bind(model, processor)

        model, processor = open_backbone(config.model, own_device(), before_weights=check)
        template = get_template(config.template, processor)
        pipeline = Pipeline(model, processor, template, config.max_new_tokens)
        images = ImageStore(int(config.image_store_mb * MEGABYTE)) if config.image_store_mb else None
        return cls._of(pipeline, menu, images)

    @classmethod
    def of(
        cls,
        pipeline: Pipeline,
        policy: str = "never",
        gates: Any = None,
        reduction: str = NO_REDUCTION,
        images: ImageStore | None = None,
    ) -> Answerer:
        """As `open`, for a backbone that is loaded already."""
        return cls._of(pipeline, ScheduleMenu(policy, _text(gates), reduction), images)

    @classmethod
    def _of(cls, pipeline: Pipeline, menu: ScheduleMenu, images: ImageStore | None) -> Answerer:
        menu.bind(pipeline.model, pipeline.processor)
        # Entering once says what is to be warned of before anybody waits for an answer.
        for one in {id(p): p for p in (menu.own.policy, menu.gates) if p is not None}.values():
            with VisualExit.from_policy(one, reductions=menu.reductions)(pipeline.model):
                pass
        backbone = describe(pipeline.model)
        text = backbone.model.config.get_text_config()
        return cls(
            pipeline=pipeline,
            menu=menu,
            reductions=menu.reductions,
            backbone=backbone,
            shape=decoder_shape(backbone.model.config),
            context=getattr(text, "max_position_embeddings", None),
            ends=frozenset(end_tokens(pipeline.model)),
            images=images,
        )

    def job(
        self,
        conversation: Conversation,
        *,
        id: str,
        emit: Any,
        schedule: ServedSchedule | None = None,
        decoding: Decoding | None = None,
        num_choices: int = 1,
        streams: bool = False,
        shares_images: bool = True,
    ) -> Job:
        """A conversation as a job that can be generated.

        Raises
        ------
        RequestError
            If the template does not take the conversation's texts.
        """
        try:
            rendered = self.pipeline.template.render(
                conversation.question,
                has_image=[len(images) for images in conversation.images],
                history=conversation.history,
                system=conversation.system,
            )
        except Exception as error:
            if not is_of_sample(error):
                raise
            raise RequestError(f"messages: {problem_text(error)}", param="messages") from error
        return Job(
            id=id,
            prompt=rendered,
            images=[image for images in conversation.images for image in images],
            schedule=schedule or self.menu.own,
            decoding=decoding or Decoding(),
            emit=emit,
            num_choices=num_choices,
            streams=streams,
            shares_images=shares_images,
        )

    def encode(self, jobs: Sequence[Job]) -> Batch:
        """The prompts of some jobs as one batch, one row for each answer.

        Raises
        ------
        RequestError
            If a single job cannot be encoded.
        """
        rows = [job for job in jobs for _ in range(job.num_choices)]
        try:
            return encode_rendered(
                self.pipeline,
                [job.id for job in rows],
                [job.prompt for job in rows],
                [job.images for job in rows],
            )
        except Exception as error:
            if len(jobs) > 1 or not is_of_sample(error):
                raise
            raise RequestError(f"messages: {problem_text(error)}", param="messages") from error

    def room(self, num_prompt: int, decoding: Decoding) -> int:
        """Tokens that an answer may have behind a prompt.

        Raises
        ------
        RequestError
            If prompt and answer do not fit the context.
        """
        wanted = decoding.max_tokens
        if self.context is None:
            return wanted or self.pipeline.max_new_tokens
        left = self.context - num_prompt
        if left < (wanted or 1):
            raise RequestError(
                f"the prompt has {num_prompt} tokens, the images' included, and {wanted or 1} more are asked "
                f"for: this model's context holds {self.context}. Ask with fewer or smaller images, less "
                "text or a smaller max_tokens",
                code="context_length_exceeded",
                param="messages",
            )
        return wanted or min(left, self.pipeline.max_new_tokens)

    def exits(self, schedules: Sequence[ServedSchedule]) -> VisualExit:
        """What lets each row follow its own schedule."""
        policy = PerRowPolicy([schedule.policy for schedule in schedules])
        return VisualExit.from_policy(policy, reductions=self.reductions)


def _text(folder: Any) -> str | None:
    return None if folder is None else str(folder)

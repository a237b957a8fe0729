"""Rows whose prompts are read together and whose answers grow together, until each has ended.

A group is generated in turns, so that others get theirs: each turn is one call of the one greedy generation
(`dyvte.backbones.greedy`) that goes on from the cache of the turn before. Between turns, rows that have ended
or that nobody waits for any more leave the batch and the cache.

Shapes: B rows, N tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from dyvte.backbones import Backbone, generate_greedily
from dyvte.runtime.cache import compact
from dyvte.serving.answerer import Answerer
from dyvte.serving.errors import RequestError
from dyvte.serving.jobs import Ended, Failed, Finished, Job, Piece, Started
from dyvte.serving.reports import report_row
from dyvte.serving.sampling import ChooseByRow, RowChoice
from dyvte.serving.text import AnswerText

# What some models keep of a batch between its passes, on themselves (M-RoPE's distance of text to images).
_KEPT_ON_MODEL = ("rope_deltas",)


class Row:
    """One answer while it grows.

    Parameters
    ----------
    job
        Whose answer it is.
    choice
        Which of the job's answers.
    tokenizer
        Decodes its tokens.
    limit
        Tokens that it may have.
    """

    def __init__(self, job: Job, choice: int, tokenizer: Any, limit: int) -> None:
        self.job, self.choice, self.limit = job, choice, limit
        self.chosen = RowChoice(job.decoding, choice)
        self.text = AnswerText(tokenizer, job.decoding.stop)
        self.tokens: list[int] = []
        self.is_over = False
        self._told = 0

    def take(self, token: int, ends: frozenset[int]) -> None:
        """One more token; tells the job what can be shown of it, and whether that was the last."""
        is_end = token in ends
        self.tokens.append(token)  # an end token that is no special one shows, as it does in evaluation
        is_last = is_end or len(self.tokens) >= self.limit
        if is_last or self.job.streams or self.text.stops:
            self._tell(is_last, len(self.tokens) - (is_end and not self.text.shows(token)))
        if is_last or self.text.is_stopped:
            self._end("stop" if is_end or self.text.is_stopped else "length")

    def give_up(self) -> None:
        """It does not grow any more."""
        self.is_over = self.chosen.is_over = True

    def _tell(self, is_last: bool, num_shown: int) -> None:
        piece = self.text.more(self.tokens, is_last=is_last)
        new = self.chosen.logprobs[self._told : num_shown]
        if piece or (new and (is_last or self.text.is_stopped)):
            self._told += len(new)
            self.job.tell(Piece(self.choice, piece, tuple(new)))

    def _end(self, reason: str) -> None:
        self.give_up()
        self.job.tell(Ended(self.choice, reason, len(self.tokens)))


class RowGroup:
    """Some jobs, one batch.

    Jobs whose prompt does not fit the context are told so, and excluded.

    Parameters
    ----------
    answerer
        The model, and how jobs become prompts.
    jobs
        At least one; all share images, or none does.

    Raises
    ------
    Exception
        What encoding them raised; with several jobs, try each alone.
    """

    def __init__(self, answerer: Answerer, jobs: Sequence[Job]) -> None:
        self.answerer = answerer
        self.batch, self.jobs, limits = _fitting(answerer, jobs)
        tokenizer = answerer.pipeline.processor.tokenizer
        self.rows = [
            Row(job, choice, tokenizer, limits[job.id])
            for job in self.jobs
            for choice in range(job.num_choices)
        ]
        self._inputs: dict[str, Any] = {} if self.batch is None else dict(self.batch.inputs)
        self._images = answerer.images if jobs[0].shares_images else None
        self._cache: Any = None
        self._kept: dict[tuple[int, str], Any] = {}

    @property
    def is_over(self) -> bool:
        """Has every answer ended?"""
        return all(row.is_over for row in self.rows)

    @property
    def live_rows(self) -> int:
        """Answers that still grow."""
        return sum(not row.is_over for row in self.rows)

    @torch.inference_mode()
    def go_on(self, pause: Callable[[int], bool] = lambda _: False) -> None:
        """A turn: until all answers have ended, half of the rows have, or ``pause``, given the number of
        tokens of this turn, says so after a token.

        Raises
        ------
        Exception
            What the model raised; nothing is known of the rows then.
        """
        if self.is_over:
            return
        model, is_first = self.answerer.pipeline.model, self._cache is None
        if is_first:
            config = self.answerer.backbone.model.config.get_text_config(decoder=True)
            self._cache = DynamicCache(config=config)
        step = _Step(self, pause)
        options: dict[str, Any] = {
            "past_key_values": self._cache,
            "stopping_criteria": StoppingCriteriaList([step]),
        }
        failed: dict[int, Exception] = {}
        if not all(row.chosen.is_plain for row in self.rows):
            options["logits_processor"] = LogitsProcessorList(
                [ChooseByRow([row.chosen for row in self.rows], failed)]
            )
        step.failed = failed
        limit = max(row.limit - len(row.tokens) for row in self.rows if not row.is_over)
        exits = self.answerer.exits([row.job.schedule for row in self.rows])
        with (
            exits(model, images=self._images) as run,
            _kept_on_model(self.answerer.backbone, self._kept),
        ):
            run.sample_ids = [row.job.id for row in self.rows]
            step.run = run if is_first else None
            ids_BN = generate_greedily(model, self._inputs, limit, **options)
        self._finish_jobs()
        self._drop(ids_BN)

    def tell_started(self, run: Any) -> None:
        """The prompts have been read: tell every job its layers."""
        record = run.records[0] if run.records else None
        now, counts = time.perf_counter(), self.batch.num_tokens_B.tolist()
        for at, row in enumerate(self.rows):
            job = row.job
            if row.choice == 0 and job.started is None:
                job.started = now
                report = report_row(self.answerer, record, at, int(counts[at]), job.schedule)
                job.tell(Started(int(counts[at]), report, now))

    def fail(self, job: Job, error: Exception) -> None:
        """Give up a job's rows."""
        for row in self.rows:
            if row.job is job:
                row.give_up()
        job.tell(Failed(error))
        job.is_cancelled = True

    def _finish_jobs(self) -> None:
        over = {job.id: True for job in self.jobs}
        for row in self.rows:
            over[row.job.id] &= row.is_over
        for job in self.jobs:
            if over[job.id] and not job.is_cancelled:
                job.tell(Finished())
        self.jobs = [job for job in self.jobs if not over[job.id]]

    def _drop(self, ids_BN: Tensor) -> None:
        """Leave only rows that go on, in batch and cache."""
        live = [at for at, row in enumerate(self.rows) if not row.is_over]
        if not live:
            self.rows, self._inputs, self._cache = [], {}, None
            return
        mask_BN = self._inputs["attention_mask"]
        added = ids_BN.shape[1] - mask_BN.shape[1]
        mask_BN = torch.cat([mask_BN, mask_BN.new_ones(len(mask_BN), added)], 1)
        if len(live) < len(self.rows):
            index = torch.tensor(live, device=ids_BN.device)
            ids_BN, mask_BN = ids_BN[index], mask_BN[index]
            self._cache.batch_select_indices(index)
            compact(self._cache)
            for key, value in self._kept.items():
                if isinstance(value, Tensor) and len(value) == len(self.rows):
                    self._kept[key] = value[index.to(value.device)]
            self.rows = [self.rows[at] for at in live]
        self._inputs = {"input_ids": ids_BN, "attention_mask": mask_BN}


class _Step(StoppingCriteria):
    """After every token: hand it to its row, and say which rows, or whether all, stop here."""

    def __init__(self, group: RowGroup, pause: Callable[[int], bool]) -> None:
        self.group, self.pause, self.count = group, pause, 0
        self.run: Any = None
        self.failed: dict[int, Exception] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        group, rows = self.group, self.group.rows
        if self.run is not None:
            group.tell_started(self.run)
            self.run = None
        self.count += 1
        for at, (row, token) in enumerate(zip(rows, input_ids[:, -1].tolist(), strict=True)):
            if row.is_over:
                continue
            if row.job.is_cancelled:
                row.give_up()
                continue
            try:
                if at in self.failed:
                    raise self.failed[at]
                row.take(token, group.answerer.ends)
            except Exception as error:  # a row that fails alone does not take its batch with it
                group.fail(row.job, error)
        over_B = torch.tensor([row.is_over for row in rows], device=input_ids.device)
        is_half = 2 * int(over_B.sum()) >= len(rows) > 1
        if is_half or self.pause(self.count):
            return torch.ones_like(over_B)
        return over_B


def _fitting(answerer: Answerer, jobs: Sequence[Job]) -> tuple[Any, list[Job], dict[str, int]]:
    """The batch of the jobs that fit the context, these jobs, and the tokens that their answers may have."""
    batch = answerer.encode(jobs)
    counts = iter(batch.num_tokens_B.tolist())
    limits: dict[str, int] = {}
    fitting = []
    for job in jobs:
        num_prompt = int(next(counts))
        for _ in range(job.num_choices - 1):
            next(counts)
        try:
            limits[job.id] = answerer.room(num_prompt, job.decoding)
            fitting.append(job)
        except RequestError as error:
            job.tell(Failed(error))
    if not fitting:
        return None, [], {}
    return (batch if len(fitting) == len(jobs) else answerer.encode(fitting)), fitting, limits


@contextmanager
def _kept_on_model(backbone: Backbone, kept: dict[tuple[int, str], Any]) -> Iterator[None]:
    """What the model keeps of a batch is this group's inside, and as it was outside."""
    places = [
        (module, name, (depth, name))
        for depth, module in enumerate(backbone.path)
        for name in _KEPT_ON_MODEL
        if hasattr(module, name)
    ]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, key in places:
        setattr(module, name, kept.get(key))
    try:
        yield
    finally:
        for (module, name, key), value in zip(places, before, strict=True):
            kept[key] = getattr(module, name)
            setattr(module, name, value)

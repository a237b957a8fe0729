"""The teacher at work on samples: images, prompts, answers, and one pass that sees every exit.

Shape letters: B rows, N tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones import (
    PromptTemplate,
    decoding_identity,
    describe,
    fingerprint,
    get_template,
    image_padding,
    weights_digest,
)
from dyvte.backbones.greedy import end_tokens
from dyvte.backbones.sizes import decoder_shape
from dyvte.costs.schedules import kv_share
from dyvte.data import Defect, Sample, Selection
from dyvte.decoder.vision import each_image_once, repeats_images
from dyvte.errors import ConfigError, MemoryBudgetError
from dyvte.formatting import GIB
from dyvte.reductions import identity, parse_reductions
from dyvte.runtime import ImageStore, VisualExit
from dyvte.runtime.frozen import check_can_freeze
from dyvte.teacher.config import TeacherConfig
from dyvte.teacher.encoder import Prepared, SampleEncoder
from dyvte.teacher.exits import positions_before, trace_checked
from dyvte.teacher.labels import greedy_answers
from dyvte.teacher.manifest import Manifest, Shard, empty_trace, exits_text, grid_fingerprint
from dyvte.teacher.plain import predicted_logits
from dyvte.teacher.reduced import trace_reduced_exits
from dyvte.teacher.streams import is_sharded
from dyvte.teacher.trace import Trace

log = logging.getLogger(__name__)


class Teacher:
    """A frozen backbone with its processor, ready to trace samples.

    Parameters
    ----------
    model
        In eval mode; also a ``PeftModel``.
    processor
        Its own.
    config
        What is labelled, and how.

    Raises
    ------
    ConfigError
        The settings do not fit the model: layers, reductions, or a reference without an adapter.
    """

    def __init__(self, model: nn.Module, processor: Any, config: TeacherConfig) -> None:
        self.model, self.processor, self.config = model, processor, config
        self._said: set[str] = set()
        self.template: PromptTemplate = get_template(config.template, processor)
        self.backbone = describe(model)
        schedules = config.schedules(self.backbone.num_layers)
        self.exits, self.freezes = schedules.exits, schedules.freezes
        self.kv_share = math.nan
        if self.freezes:
            check_can_freeze(self.backbone)
            self.kv_share = kv_share(decoder_shape(self.backbone.model.config))
        self.reductions = parse_reductions(config.reductions)
        for reduction in self.reductions:
            reduction.check(self.backbone.num_layers)
            reduction.check_backbone(self.backbone)
        self.dtype = next(model.parameters()).dtype
        device = next(model.parameters()).device
        self.encoder = SampleEncoder(processor, self.template, config, device, self.dtype)
        if config.reference == "base" and not hasattr(model, "disable_adapter"):
            raise ConfigError(
                "reference: base compares with the model without its adapter, but it has none: give one as "
                "model.adapter"
            )

    def fingerprint(self, selection_sha256: str) -> dict[str, str]:
        """One entry per thing that the traces depend on.

        Parameters
        ----------
        selection_sha256
            Digest of the samples.
        """
        probe = self.template.render("probe", "answer").text
        images = getattr(self.processor, "image_processor", None)
        image_settings = json.dumps(
            images.to_dict() if images is not None else {}, sort_keys=True, default=str
        )
        labels = self.config.label_source
        compared = {}
        if self.config.reference == "base":
            with self.as_reference():
                compared["reference"] = f"base {weights_digest(self.model)}"
        if self.reductions:
            compared["reductions"] = identity(self.reductions)
        if self.config.label_source == "greedy":
            compared["decoding"] = decoding_identity(self.model)
        return {
            **compared,
            **grid_fingerprint(self.freezes, self.kv_share),
            "backbone": fingerprint(self.model),
            "backbone_weights": str(weights_digest(self.model)),
            "data": selection_sha256,
            "prompt": f"{self.template.version} {_digest(probe)}",
            "images": f"{image_padding(self.processor)} {_digest(image_settings)}",
            "features": "+".join(self.config.features),
            "exits": exits_text(self.exits, self.backbone.num_layers),
            "labels": f"greedy {self.config.max_new_tokens}" if labels == "greedy" else labels,
            "max_length": str(self.config.max_length),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def manifest(self, selection: Selection) -> Manifest:
        """The manifest of a store that holds these samples.

        Parameters
        ----------
        selection
            What will be traced.
        """
        return Manifest(
            fingerprint=self.fingerprint(selection.sha256),
            num_samples=len(selection.samples),
            shard_size=self.config.batch_size * self.config.shard_batches,
            num_layers=self.backbone.num_layers,
            feature_size=len(self.config.features) * self.backbone.hidden_size,
        )

    def as_reference(self) -> AbstractContextManager[Any]:
        """Inside, the model is the one that exits are compared with."""
        return self.model.disable_adapter() if self.config.reference == "base" else nullcontext()

    def answer(self, prompts: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Prompts grown by the full model's greedy answers, as labels are made; see `greedy_answers`.

        Rows that ask about the same image read one prefill of it.

        Parameters
        ----------
        prompts
            Left-padded model inputs.
        """
        with self.as_reference(), self._sharing(prompts):
            return greedy_answers(self.model, prompts, self.config.max_new_tokens)

    def _sharing(self, prompts: dict[str, Tensor]) -> AbstractContextManager[Any]:
        # Processes that share one model's weights must run the same passes, whatever images they have.
        if not self.config.share_images or is_sharded(self.model):
            return self._each_image_once()
        if not repeats_images(self.backbone, prompts):
            return nullcontext()
        return VisualExit()(self.model, images=ImageStore())

    def _each_image_once(self) -> AbstractContextManager[Any]:
        return each_image_once(self.backbone) if self.config.share_images else nullcontext()

    def trace(self, samples: Sequence[Sample], file: str = "") -> tuple[Shard, list[Defect]]:
        """Trace one batch; samples that cannot be used come back as defects (see `prepare`).

        A batch that does not fit the memory budget is traced in halves.

        Parameters
        ----------
        samples
            Of a batch.
        file
            That they are of, for messages.

        Raises
        ------
        MemoryBudgetError
            If a single sample does not fit, or a sharded backbone's batch: there all processes must run the
            same passes.
        """
        try:
            return self._trace_whole(samples, file)
        except MemoryBudgetError:
            if len(samples) < 2 or is_sharded(self.model):
                raise
        middle = len(samples) // 2
        halves = [self.trace(part, file) for part in (samples[:middle], samples[middle:])]
        return Shard.cat([shard for shard, _ in halves]), [*halves[0][1], *halves[1][1]]

    def _trace_whole(self, samples: Sequence[Sample], file: str) -> tuple[Shard, list[Defect]]:
        ready = self.prepare(samples, file)
        notes: Counter[str] = Counter()
        if not ready.samples:
            trace = self._empty()
        elif self.config.label_source == "greedy":
            trace = self._trace_greedy(ready.samples, ready.images, ready.inputs, notes)
        else:
            trace, _ = self._run(ready.samples, ready.inputs, ready.answer_BN, notes)
        image_ids = tuple(sample.image_id for sample in ready.samples)
        return Shard(trace=trace, image_ids=image_ids, notes=dict(notes)), ready.defects

    def prepare(self, samples: Sequence[Sample], file: str = "") -> Prepared:
        """Inputs of those samples that can be used; the rest by name. See `SampleEncoder.prepare`.

        Parameters
        ----------
        samples
            Of a batch.
        file
            That they are of, for messages.
        """
        return self.encoder.prepare(samples, file)

    def _trace_greedy(
        self,
        samples: Sequence[Sample],
        images: Sequence[Any],
        prompts: dict[str, Tensor],
        notes: Counter[str],
    ) -> Trace:
        """Traces of the model's own answers, in the given order."""
        parts: list[Trace] = []
        rest = list(range(len(samples)))
        if self.config.try_answers:
            parts.append(self._trace_confirmed(samples, images, prompts, notes))
            known = set(parts[0].sample_ids)
            rest = [row for row in rest if samples[row].id not in known]
        cut = lost = 0
        if rest:
            chosen = [samples[row] for row in rest]
            if len(rest) < len(samples):
                prompts, _ = self.encoder.encode(chosen, [images[row] for row in rest], with_answer=False)
            inputs, answer_BN = self.answer(prompts)
            trace, is_greedy_B = self._run(chosen, inputs, answer_BN, notes)
            cut = int((~self.ends_answer(inputs, answer_BN).any(1)).sum())
            lost = int((~is_greedy_B).sum())
            parts.append(trace)
        notes.update(answers_generated=len(rest), answers_cut=cut, answers_not_reproduced=lost)
        joined = Trace.cat(parts)
        place = {sample_id: row for row, sample_id in enumerate(joined.sample_ids)}
        return joined.rows([place[sample.id] for sample in samples])

    def _trace_confirmed(
        self,
        samples: Sequence[Sample],
        images: Sequence[Any],
        prompts: dict[str, Tensor],
        notes: Counter[str],
    ) -> Trace:
        """Traces of those samples whose given answer is the model's own, told by the pass over it.

        It is where every answer token is the argmax (then generation would choose the same tokens one by
        one), the tokens before it are the prompt's own, and the one EOS comes last and within the token
        limit.
        """
        inputs, answer_BN = self.encoder.encode(samples, images, with_answer=True)
        fits = (answer_BN.sum(1) <= self.config.max_new_tokens).nonzero().flatten().tolist()
        if not fits:
            return self._empty()
        if len(fits) < len(samples):
            samples, images = [samples[row] for row in fits], [images[row] for row in fits]
            prompts = {name: prompts[name][fits] for name in ("input_ids", "attention_mask")}
            inputs, answer_BN = self.encoder.encode(samples, images, with_answer=True)
        trace, own_B = self._run(samples, inputs, answer_BN, notes)
        prompt_BN = inputs["attention_mask"].bool() & ~answer_BN
        is_eos_BN = self.ends_answer(inputs, answer_BN)
        for row in range(len(samples)):
            asked = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
            closed = is_eos_BN[row][answer_BN[row]].tolist()
            ends_once = closed == [False] * (len(closed) - 1) + [True]
            own_B[row] &= torch.equal(inputs["input_ids"][row][prompt_BN[row]], asked) and ends_once
        return trace.rows(own_B.nonzero().flatten())

    def _run(
        self,
        samples: Sequence[Sample],
        inputs: dict[str, Tensor],
        answer_BN: Tensor,
        notes: Counter[str],
    ) -> tuple[Trace, Tensor]:
        """One pass: the trace on the CPU, features in the model's dtype; is each answer the argmax?"""
        ids = [sample.id for sample in samples]
        reference_BAV = None
        if self.config.reference == "base":
            with torch.no_grad(), self.as_reference(), self._each_image_once():
                reference_BAV, _ = predicted_logits(self.model, inputs, positions_before(answer_BN, ids))
        if self.reductions:
            trace, is_greedy_B = trace_reduced_exits(
                self.model,
                inputs,
                answer_BN,
                self.reductions,
                sample_ids=ids,
                exits=self.exits,
                freezes=self.freezes,
                features=self.config.features,
                reference_BAV=reference_BAV,
            )
            return self._kept(trace), is_greedy_B
        budget = self.config.memory_budget
        found = trace_checked(
            self.model,
            inputs,
            answer_BN,
            sample_ids=ids,
            exits=self.exits,
            freezes=self.freezes,
            share_images=self.config.share_images,
            exits_per_chunk=self.config.exits_per_chunk,
            memory_budget=None if budget is None else int(budget * GIB),
            features=self.config.features,
            reference_BAV=reference_BAV,
        )
        notes["visual_streams"] += found.num_images
        if found.not_shared is not None and found.not_shared not in self._said:
            self._said.add(found.not_shared)
            log.warning("questions about one image compute it each on their own: %s", found.not_shared)
        return self._kept(found.trace), found.is_greedy_B

    def _empty(self) -> Trace:
        features = len(self.config.features) * self.backbone.hidden_size
        return empty_trace(
            self.backbone.num_layers, features, self.dtype, self.exits, self.freezes, self.kv_share
        )

    def _kept(self, trace: Trace) -> Trace:
        """As it goes to disk."""
        trace, grid = trace.to("cpu"), None
        if trace.grid is not None:
            stored = {name: getattr(trace.grid, name).to(self.dtype) for name in ("embeddings", "features")}
            grid = replace(trace.grid, **stored)
        return replace(trace, features=trace.features.to(self.dtype), grid=grid)

    def ends_answer(self, inputs: dict[str, Tensor], answer_BN: Tensor) -> Tensor:
        """(B, N) bool: answer tokens that end a generation.

        Parameters
        ----------
        inputs
            Of prompts and answers.
        answer_BN
            (B, N) bool: answer tokens.
        """
        eos_ids = torch.tensor(end_tokens(self.model), device=answer_BN.device)
        return torch.isin(inputs["input_ids"], eos_ids) & answer_BN


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

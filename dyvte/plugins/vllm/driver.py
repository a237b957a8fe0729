"""Runs the decoder layers of a step in which visual tokens freeze or leave.

Shape letters as in `dyvte.plugins.vllm.step`; D hidden size, B requests that gates decide on, P their tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.forward_context import (
    ForwardContext,
    get_forward_context,
    is_forward_context_available,
    override_forward_context,
)

from dyvte.errors import ExitRuntimeError
from dyvte.gates import prompt_features, reads_visual
from dyvte.plugins.vllm.attention import Recorded, recorded
from dyvte.plugins.vllm.book import Prompt, RequestBook
from dyvte.plugins.vllm.frozen import KeyValueWriter
from dyvte.plugins.vllm.options import may_leave
from dyvte.plugins.vllm.reports import Reports
from dyvte.plugins.vllm.step import Decoding, Part, Selection, State
from dyvte.policies import LearnedPolicy, Policy, Rows


@dataclasses.dataclass
class Step:
    """One forward pass.

    Attributes
    ----------
    context
        vLLM's own, of the whole batch.
    metadata
        What the attention metadata of each layer were built from.
    parts
        The requests.
    num_rows
        n; rows behind it are padding.
    decoding
        The requests instead, where each gets one more token of its answer.
    """

    context: ForwardContext
    metadata: list[Recorded]
    parts: list[Part]
    num_rows: int

    decoding: Decoding | None = None

    def states(self, done: int) -> tuple[State, ...]:
        """Of each request, after ``done`` layers."""
        return tuple(part.state(done, len(self.metadata)) for part in self.parts)

    def behind(self, done: int) -> tuple[Any, Selection | None]:
        """What a layer after ``done`` ones computes, under a key of its own; None: the whole step."""
        if self.decoding is not None:
            return self.decoding.behind(done)
        states = self.states(done)
        full = all(state is State.FULL for state in states)
        return states, None if full else Selection.of(self.parts, states)


class Driver:
    """The part of a model that knows schedules; it holds no weights but the gates'.

    Parameters
    ----------
    stack
        vLLM's decoder: ``layers``, which take positions, hidden states and residual, and ``norm``.
    policy
        Decides on prompts.
    book
        The prompts of the batch.
    reports
        Takes down what was decided.
    """

    def __init__(self, stack: Any, policy: Policy, book: RequestBook, reports: Reports) -> None:
        self.stack, self.policy, self.book, self.reports = stack, policy, book, reports
        self.layers = list(stack.layers)
        self.num_layers = len(self.layers)
        self.names = [layer.self_attn.attn.layer_name for layer in self.layers]
        self.leaves = may_leave(policy, self.num_layers)
        self.writers: list[KeyValueWriter] = []
        if policy.may_freeze:
            self.writers = [KeyValueWriter(layer) for layer in self.layers]

    def step(self) -> Step | None:
        """The forward pass that begins; None where it is vLLM's own: nothing of it freezes or leaves."""
        context = get_forward_context() if is_forward_context_available() else None
        metadata = context.attn_metadata if context is not None else None
        if context is None or not isinstance(metadata, dict) or not self.book.rows:
            return None  # a run to measure memory or to compile
        found = [recorded(metadata.get(name)) for name in self.names]
        if any(one is None for one in found):
            return None
        step = Step(context, found, [], 0)  # type: ignore[arg-type]
        common = step.metadata[0].common
        starts = common.query_start_loc_cpu.numpy()
        step.num_rows = int(starts[common.num_reqs])
        seq_lens = common.seq_lens_cpu_upper_bound.numpy()
        if _only_decodes(common):
            return self._decoding(step, seq_lens)
        for row in range(common.num_reqs):
            start, stop = int(starts[row]), int(starts[row + 1])
            if stop > start:
                step.parts.append(Part(row, start, stop, int(seq_lens[row]), self._prompt(row)))
        for part in step.parts:
            if part.prompt.exit_layer is None:
                self._decide(part.prompt)
        asks = any(self._undecided(part) for part in step.parts)
        # A request's state only ever changes in one direction.
        if not asks and all(state is State.FULL for state in step.states(self.num_layers - 1)):
            self._report(step)
            return None
        return step

    def in_place(self, step: Step) -> bool:
        """Can vLLM's own forward run the step, all its rows in all layers? It can while it decodes."""
        return step.decoding is not None or not any(part.has_visual for part in step.parts)

    @contextlib.contextmanager
    def metadata(self, step: Step) -> Iterator[None]:
        """vLLM's forward inside this reads and writes, behind an exit, what text has there."""
        attn_metadata, slot_mapping = dict(step.context.attn_metadata), dict(step.context.slot_mapping)
        made: dict[Any, tuple[Any, Tensor]] = {}
        for index, name in enumerate(self.names):
            which, selection = step.behind(index)
            if selection is None:
                continue
            source = step.metadata[index]
            key = (which, id(source.common))
            if key not in made:
                smaller, slots = source.smaller(selection)
                made[key] = smaller, _padded(slots, len(slot_mapping[name]))
            attn_metadata[name], slot_mapping[name] = made[key]
        inside = dataclasses.replace(step.context, attn_metadata=attn_metadata, slot_mapping=slot_mapping)
        with override_forward_context(inside):
            yield
        self._report(step)

    @torch.no_grad()
    def run(
        self, step: Step, positions: Tensor, inputs_embeds: Tensor, behind: Sequence[Tensor] = ()
    ) -> Tensor:
        """(rows, D) the decoder's output; zeros at rows of visual tokens that did not reach its end.

        Parameters
        ----------
        positions
            (n,), or (3, n) of M-RoPE.
        inputs_embeds
            (n, D).
        behind
            For each of the first layers, (n, D) what the model adds behind it (deepstack).
        """
        stream = _Stream(self, step, positions, inputs_embeds)
        asking = [part for part in step.parts if self._undecided(part)]
        plan = self._plan(asking) if asking else None
        for index in range(self.num_layers):
            if plan is not None and plan.asks(index):
                features_BF = stream.features(asking, plan.asking_rows(), plan.features)
                plan.step(index, plan.logits(index, features_BF).float().cpu())
                for part, freeze, leave in zip(
                    asking, plan.freeze_layers_B.tolist(), plan.exit_layers_B.tolist(), strict=True
                ):
                    part.prompt.decide(freeze, leave)
            stream.enter(index)
            stream.run(index)
            if index < len(behind):
                stream.add(behind[index])
        for part in asking:
            if part.prompt.exit_layer is None:
                part.prompt.decide(self.num_layers, self.num_layers)
        self._report(step)
        return stream.output()

    def _decoding(self, step: Step, seq_lens: np.ndarray) -> Step | None:
        """A step of answers alone: it costs little, as there are many of them."""
        if not self.leaves:
            return None
        prompts = [self._prompt(row) for row in range(step.num_rows)]
        step.decoding = Decoding(prompts, seq_lens[: step.num_rows].astype(np.int64))
        return None if step.decoding.behind(self.num_layers - 1)[1] is None else step

    def _prompt(self, row: int) -> Prompt:
        try:
            return self.book.rows[row]
        except KeyError:
            raise ExitRuntimeError(
                f"vLLM's batch has a request in row {row} that was not announced: is dyvte's entry point in "
                "the group vllm.logits_processors missing? Install dyvte again"
            ) from None

    def _undecided(self, part: Part) -> bool:
        return part.prompt.exit_layer is None and part.has_visual

    def _decide(self, prompt: Prompt) -> None:
        """Decide on a prompt for which no gate must be asked."""
        if prompt.num_visual == 0 or prompt.num_text == 0:
            # Nothing to let go; or its answer is read from a visual token, which therefore must stay.
            prompt.decide(self.num_layers, self.num_layers)
        elif not isinstance(self.policy, LearnedPolicy):
            plan = self.policy.start(_rows(self.num_layers, [prompt]))
            prompt.decide(int(plan.freeze_layers_B[0]), int(plan.exit_layers_B[0]))

    def _plan(self, asking: list[Part]) -> Any:
        for part in asking:
            if part.computed or part.seq_len < part.prompt.num_tokens:
                raise ExitRuntimeError(
                    f"gates read a whole prompt at once, but {part.stop - part.start} of "
                    f"{part.prompt.num_tokens} tokens are computed in this step: raise max_num_batched_tokens"
                )
        return self.policy.start(_rows(self.num_layers, [part.prompt for part in asking]))

    def _report(self, step: Step) -> None:
        for part in step.parts:
            if part.ends_prompt and part.prompt.num_visual:
                self.reports.add(part.prompt)


class _Stream:
    """Hidden states on their way through the layers."""

    def __init__(self, driver: Driver, step: Step, positions: Tensor, inputs_embeds: Tensor) -> None:
        self.driver, self.step, self.positions, self.embeds = driver, step, positions, inputs_embeds
        self.device = inputs_embeds.device
        self.hidden: Tensor = inputs_embeds[: step.num_rows]
        self.residual: Tensor | None = None
        self.rows_R = np.arange(step.num_rows)
        self.states: tuple[State, ...] = (State.FULL,) * len(step.parts)
        self.selection: Selection | None = None
        self.frozen: dict[int, tuple[np.ndarray, Tensor]] = {}
        self._joined: tuple[Tensor, Tensor] | None = None
        self._made: dict[int, tuple[Any, Tensor]] = {}

    @property
    def state(self) -> Tensor:
        """(R, D) what the layer before put out."""
        return self.hidden if self.residual is None else self.hidden + self.residual

    def enter(self, index: int) -> None:
        """Let rows freeze and go before layer ``index`` (0-based)."""
        states = self.step.states(index)
        if states == self.states:
            return
        parts = self.step.parts
        for number, (part, before, now) in enumerate(zip(parts, self.states, states, strict=True)):
            if before is State.FULL and now is State.FROZEN:
                rows = np.arange(part.start, part.stop)[part.visual_Q]
                self.frozen[number] = (rows, self.state[self._places(rows)])
            elif now is State.GONE:
                self.frozen.pop(number, None)
        self.states, self._joined, self._made = states, None, {}
        self.selection = Selection.of(parts, states, self.step.metadata[index].short)
        kept = self._places(self.selection.rows_R)
        self.hidden = self.hidden[kept]
        self.residual = None if self.residual is None else self.residual[kept]
        self.rows_R = self.selection.rows_R

    def run(self, index: int) -> None:
        """Layer ``index`` on the rows that are left; keys and values alone of the frozen ones."""
        driver, source = self.driver, self.step.metadata[index]
        if self.frozen:
            rows, hidden = self._frozen()
            slots = source.common.slot_mapping[rows]
            driver.writers[index].write(hidden, self.positions[..., rows], slots)
        if not len(self.rows_R):
            return
        layer, name = driver.layers[index], driver.names[index]
        if self.selection is None:
            positions = self.positions[..., : self.step.num_rows]
            self.hidden, self.residual = layer(positions, self.hidden, self.residual)
            return
        if id(source.common) not in self._made:
            self._made[id(source.common)] = source.smaller(self.selection)
        metadata, slots = self._made[id(source.common)]
        inside = dataclasses.replace(
            self.step.context, attn_metadata={name: metadata}, slot_mapping={name: slots}
        )
        positions = self.positions[..., self._tensor(self.rows_R)]
        with override_forward_context(inside):
            self.hidden, self.residual = layer(positions, self.hidden, self.residual)

    def add(self, values_nD: Tensor) -> None:
        """Add to the states of all rows that are left, frozen ones among them."""
        self.hidden = self.hidden + values_nD[self._tensor(self.rows_R)]
        for number, (rows, hidden) in self.frozen.items():
            self.frozen[number] = (rows, hidden + values_nD[self._tensor(rows)])
        self._joined = None

    def output(self) -> Tensor:
        """The decoder's output, each row in its place."""
        width = self.positions.shape[-1]
        found = self.embeds.new_zeros(width, self.embeds.shape[-1])
        if len(self.rows_R):
            found[self._tensor(self.rows_R)] = self.driver.stack.norm(self.hidden, self.residual)[0]
        return found

    def features(self, asking: list[Part], wanted_B: Tensor, names: tuple[str, ...]) -> Tensor:
        """(B, F) what gates read of each prompt; zeros of those that do not ask any more."""
        lengths = [part.prompt.num_tokens for part in asking]
        visual_BP, prompt_BP = np.zeros((2, len(asking), max(lengths)), bool)
        rows_BP = np.zeros((len(asking), max(lengths)), np.int64)
        for number, (part, length) in enumerate(zip(asking, lengths, strict=True)):
            rows_BP[number, :length] = np.arange(part.start, part.start + length)
            if wanted_B[number]:
                prompt_BP[number, part.prompt.text_start : length] = True
                visual_BP[number, :length] = part.prompt.visual_N
        read_BP = prompt_BP | visual_BP if reads_visual(names) else prompt_BP
        used = read_BP.any(0).nonzero()[0]
        span = slice(int(used[0]), int(used[-1]) + 1)
        hidden_BPD = self._read(rows_BP[:, span], read_BP[:, span])
        masks = [torch.from_numpy(mask[:, span].copy()).to(self.device) for mask in (prompt_BP, visual_BP)]
        return prompt_features(hidden_BPD, *masks, names=names)

    def _read(self, rows_BP: np.ndarray, read_BP: np.ndarray) -> Tensor:
        """(B, P, D) states of rows, wherever they are; any state where nothing is read."""
        places = np.full(self.step.num_rows, -1)
        places[self.rows_R] = np.arange(len(self.rows_R))
        state = self.state
        for rows, hidden in self.frozen.values():
            places[rows] = len(state) + np.arange(len(rows))
            state = torch.cat((state, hidden))
        return state[self._tensor(np.where(read_BP, places[rows_BP], 0))]

    def _frozen(self) -> tuple[Tensor, Tensor]:
        if self._joined is None:
            rows = np.concatenate([rows for rows, _ in self.frozen.values()])
            self._joined = self._tensor(rows), torch.cat([hidden for _, hidden in self.frozen.values()])
        return self._joined

    def _places(self, rows: np.ndarray) -> Tensor:
        """Where rows of the step are among those that are left."""
        places = np.full(self.step.num_rows, -1)
        places[self.rows_R] = np.arange(len(self.rows_R))
        return self._tensor(places[rows])

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)


def _only_decodes(common: Any) -> bool:
    """Does every request of the batch get one more token of its answer?"""
    whose = common.is_prefilling
    return common.max_query_len == 1 and whose is not None and not bool(whose[: common.num_reqs].any())


def decoder_of(model: nn.Module) -> Any:
    """The decoder of a multimodal model of vLLM."""
    return model.language_model.model  # type: ignore[union-attr]


def _rows(num_layers: int, prompts: list[Prompt]) -> Rows:
    return Rows(
        num_layers=num_layers,
        num_visual_B=torch.tensor([prompt.num_visual for prompt in prompts]),
        num_prompt_B=torch.tensor([prompt.num_text for prompt in prompts]),
        sample_ids=[prompt.tag or "" for prompt in prompts],
    )


def _padded(slots: Tensor, length: int) -> Tensor:
    """Slots of padding rows are -1: nothing is written for them."""
    return (
        torch.nn.functional.pad(slots, (0, length - len(slots)), value=-1) if len(slots) < length else slots
    )

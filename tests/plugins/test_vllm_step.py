"""What each layer does with each request's rows inside vLLM, against a cache simulated token by token."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from dyvte.plugins.vllm.book import Prompt, RequestBook
from dyvte.plugins.vllm.step import Decoding, Part, Selection, State

LAYERS = 4


def make_prompt(rng, freeze, leave):
    """One to three images with text around them, text last."""
    pieces = [np.zeros(rng.integers(0, 4), bool)]
    for _ in range(rng.integers(1, 4)):
        pieces += [np.ones(rng.integers(1, 7), bool), np.zeros(rng.integers(0, 3), bool)]
    prompt = Prompt(np.concatenate([*pieces, np.zeros(rng.integers(1, 5), bool)]))
    prompt.decide(freeze, leave)
    return prompt


def chunks(rng, length):
    cuts = np.sort(rng.integers(1, length, size=rng.integers(0, 4)))
    edges = [0, *dict.fromkeys(cuts.tolist()), length]
    return list(pairwise(edges))


class Cache:
    """One layer's keys of one request: which position of the sequence lies at which place."""

    def __init__(self):
        self.at: dict[int, int] = {}


def run_layer(parts, caches, index, selection):
    """Write what the layer writes, then note what each row reads: row of the step -> positions."""
    for part, cache in zip(parts, caches, strict=True):
        if part.state(index, LAYERS) is State.FROZEN:
            for offset in np.flatnonzero(part.visual_Q):
                cache.at[part.computed + offset] = part.computed + int(offset)
    by_row = {part.row: (part, cache) for part, cache in zip(parts, caches, strict=True)}
    for row, place, table_row in zip(
        selection.rows_R, selection.places_R, selection.table_rows_R, strict=True
    ):
        part, cache = by_row[table_row]
        cache.at[int(place)] = part.computed + int(row) - part.start
    reads, first = {}, 0
    for length, seq_len, table_row in zip(
        selection.lengths_V, selection.seq_lens_V, selection.table_rows_V, strict=True
    ):
        cache = by_row[table_row][1]
        for number in range(length):
            seen = range(seq_len - length + number + 1)  # causal attention of a batch's request
            reads[int(selection.rows_R[first + number])] = [cache.at[place] for place in seen]
        first += length
    return reads


@pytest.mark.parametrize("seed", range(40))
def test_every_row_reads_what_the_schedule_says(seed):
    """Chunks of any size, several requests at layers of their own, and answers behind the prompts."""
    rng = np.random.default_rng(seed)
    layers = [sorted(rng.integers(0, LAYERS + 1, size=2)) for _ in range(3)]
    prompts = [make_prompt(rng, *pair) for pair in layers]
    lengths = [prompt.num_tokens + int(rng.integers(0, 4)) for prompt in prompts]
    plans = [chunks(rng, length) for length in lengths]
    caches = [[Cache() for _ in prompts] for _ in range(LAYERS)]
    for step in range(max(map(len, plans))):
        parts, start = [], 0
        owners = [n for n in range(len(prompts)) if step < len(plans[n])]
        for n in owners:
            a, b = plans[n][step]
            parts.append(Part(n, start, start + b - a, b, prompts[n]))
            start += b - a
        for index in range(LAYERS):
            states = tuple(part.state(index, LAYERS) for part in parts)
            selection = Selection.of(parts, states, short=int(rng.integers(0, 3)))
            reads = run_layer(parts, [caches[index][n] for n in owners], index, selection)
            for part in parts:
                check_part(part, index, reads)


def check_part(part, index, reads):
    """Text sees all before it, the image while it may be read; visual rows run while they are updated."""
    prompt = part.prompt
    whole = np.arange(part.seq_len)
    visual = np.isin(whole, np.flatnonzero(prompt.visual_N))
    for position in range(part.computed, part.seq_len):
        row = part.start + position - part.computed
        expected = whole[: position + 1]
        if index >= prompt.exit_layer:
            expected = expected[~visual[: position + 1]]
        runs = not visual[position] or index < min(prompt.freeze_layer, prompt.exit_layer)
        assert (row in reads) == runs
        if runs:
            assert reads[row] == expected.tolist()


@pytest.mark.parametrize("seed", range(10))
def test_decoding_needs_no_parts(seed):
    """The short way through steps of answers selects what the general one does."""
    rng = np.random.default_rng(seed)
    prompts = [make_prompt(rng, *sorted(rng.integers(0, LAYERS + 1, size=2))) for _ in range(5)]
    text = Prompt(np.zeros(4, bool))
    text.decide(LAYERS, LAYERS)
    prompts.append(text)
    seq_lens = np.array([prompt.num_tokens + 1 + rng.integers(0, 3) for prompt in prompts])
    parts = [Part(n, n, n + 1, int(seq_lens[n]), prompt) for n, prompt in enumerate(prompts)]
    decoding = Decoding(prompts, seq_lens)
    keys = {}
    for done in range(LAYERS):
        states = tuple(part.state(done, LAYERS) for part in parts)
        key, selection = decoding.behind(done)
        assert keys.setdefault(key, states) == states
        assert (selection is None) == all(state is State.FULL for state in states)
        if selection is not None:
            wanted = Selection.of(parts, states)
            for name in ("rows_R", "lengths_V", "seq_lens_V", "table_rows_V", "gone_R"):
                assert getattr(selection, name).tolist() == getattr(wanted, name).tolist()
            assert selection.places_R[wanted.gone_R].tolist() == wanted.places_R[wanted.gone_R].tolist()


def test_short_requests_come_first_where_a_backend_wants_it():
    prompt = Prompt(np.array([0, 1, 1, 0, 1, 0, 0], bool))
    prompt.decide(0, LAYERS)
    parts = [Part(0, 0, 7, 7, prompt), Part(1, 7, 8, 12, Prompt(np.zeros(12, bool)))]
    states = tuple(part.state(1, LAYERS) for part in parts)
    assert states == (State.FROZEN, State.FULL)
    plain, sorted_ = (Selection.of(parts, states, short=short) for short in (0, 1))
    assert plain.lengths_V.tolist() == [1, 1, 2, 1]
    assert sorted_.lengths_V.tolist() == [1, 1, 1, 2]
    assert sorted_.rows_R.tolist() == [0, 3, 7, 5, 6]
    assert sorted_.seq_lens_V.tolist() == [1, 4, 12, 7]


def test_a_prompt_knows_its_question():
    prompt = Prompt(np.array([0, 1, 1, 0, 1, 0, 0], bool))
    assert (prompt.num_tokens, prompt.num_visual, prompt.text_start, prompt.num_text) == (7, 3, 5, 2)
    assert prompt.text_before(0, 10).tolist() == [0, 1, 1, 1, 2, 2, 3, 4, 5, 6]
    assert prompt.visual(3, 9).tolist() == [False, True, False, False, False, False]
    assert Prompt(np.zeros(3, bool)).num_text == 3
    assert Prompt(np.ones(3, bool)).num_text == 0


def test_the_book_follows_the_batch():
    """Requests come, go, move and change places; one that was passed over comes back as it was."""
    book = RequestBook([5, 6], max_num_seqs=4)
    lists = [[1, 5, 6, 2], [1, 2], [1, 5, 3, 4]]
    book.update([], [(n, tokens, f"t{n}") for n, tokens in enumerate(lists)], [])
    first, second, third = (book.rows[n] for n in range(3))
    assert [p.num_visual for p in (first, second, third)] == [2, 0, 1]
    assert third.tag == "t2"
    first.decide(2, 3)
    book.update([0], [], [(2, 0, False)])
    assert book.rows == {0: third, 1: second}
    book.update([], [(2, lists[0], None)], [(0, 1, True)])
    assert book.rows == {0: second, 1: third, 2: first}
    assert (first.freeze_layer, first.exit_layer) == (2, 3)
    book.update([], [(2, list(lists[0]), None)], [])
    assert book.rows[2] is not first
    assert book.rows[2].exit_layer is None


def test_a_prompt_is_frozen_where_it_leaves_at_the_latest():
    prompt = Prompt(np.array([1, 0], bool))
    prompt.decide(9, 4)
    assert (prompt.freeze_layer, prompt.exit_layer) == (4, 4)

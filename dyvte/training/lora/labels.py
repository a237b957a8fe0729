"""Answers to distil on, made once: what the un-adapted full model says, kept on disk, token by token.

Shape letters: B rows, N tokens, A answer tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyvte.data import Sample, Selection, check_defects, log_excluded
from dyvte.distributed import Processes
from dyvte.errors import CheckpointError
from dyvte.files import write_atomically
from dyvte.teacher import Teacher
from dyvte.teacher.batches import batches_of
from dyvte.teacher.labels import append_answers

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Labelled:
    """Samples that can be used, with the answer tokens of each; ``inputs`` makes batches of them."""

    teacher: Teacher
    samples: tuple[Sample, ...]
    answers: Mapping[str, list[int]]
    dropped: tuple[str, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)
    file: str = ""
    """For messages."""

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, index: Sequence[int]) -> Labelled:
        """The samples at ``index``."""
        samples = tuple(self.samples[i] for i in index)
        return Labelled(self.teacher, samples, self.answers, file=self.file)

    def inputs(self, index: Sequence[int]) -> tuple[dict[str, Tensor], Tensor, list[str]]:
        """Model inputs, (B, N) answer mask and sample ids of the samples at ``index``."""
        ready = self.teacher.prepare([self.samples[i] for i in index], self.file)
        check_defects(ready.defects, 0)
        ids = [sample.id for sample in ready.samples]
        if self.teacher.config.label_source == "data":
            return ready.inputs, ready.answer_BN, ids
        tokenizer = self.teacher.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        answers = [torch.tensor(self.answers[sample_id]) for sample_id in ids]
        padded_BA = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=pad)
        length_B = torch.tensor([len(answer) for answer in answers])
        mask_BA = torch.arange(padded_BA.shape[1]) < length_B[:, None]
        device = ready.inputs["input_ids"].device
        return *append_answers(ready.inputs, padded_BA.to(device), mask_BA.to(device)), ids


def label(
    folder: Path,
    teacher: Teacher,
    selection: Selection,
    processes: Processes,
    *,
    file: str,
    max_bad_samples: int,
    progress: Callable[[int], None],
) -> Labelled:
    """Label what is not yet in the folder, every process its share; then read it all.

    Parameters
    ----------
    folder
        Of the answers.
    teacher
        Answers as the model without adapter.
    selection
        Of the samples.
    processes
        That share the samples.
    file
        That they are of, for messages.
    max_bad_samples
        Unusable ones that are tolerated.
    progress
        Called with the number of samples done since the last call.

    Raises
    ------
    CheckpointError
        If the folder holds labels of other data, another backbone or other settings.
    DataError
        If more than ``max_bad_samples`` samples cannot be used.
    """
    _check_manifest(folder, teacher.fingerprint(selection.sha256), processes)
    size = teacher.config.batch_size * teacher.config.shard_batches
    starts = range(0, len(selection.samples), size)
    parts = [folder / f"answers-{index:05d}.json" for index in range(len(starts))]
    bad = list(selection.defects)
    if processes.first:
        log_excluded(bad)
    for index in range(processes.rank, len(parts), processes.world_size):
        samples = selection.samples[starts[index] : starts[index] + size]
        if _read(parts[index]) is None:
            record, defects = _label_part(teacher, samples, file, progress)
            bad += defects
            check_defects(bad, max_bad_samples)
            write_atomically(parts[index], json.dumps(record) + "\n")
        else:
            progress(len(samples))
    processes.barrier()
    records = [_read(path) for path in parts]
    answers: dict[str, list[int]] = {}
    notes: Counter[str] = Counter()
    dropped: list[str] = []
    for path, record in zip(parts, records, strict=True):
        if record is None:
            raise CheckpointError(f"{path}: not readable; remove it and start the same command again")
        answers |= record["answers"]
        notes.update(record["notes"])
        dropped += record["dropped"]
    # Each process has counted its own share, and nothing that was there before.
    check_defects([*selection.defects, *dropped], max_bad_samples)
    usable = tuple(sample for sample in selection.samples if sample.id in answers)
    return Labelled(teacher, usable, answers, tuple(dropped), dict(notes), file)


def _label_part(
    teacher: Teacher, samples: Sequence[Sample], file: str, progress: Callable[[int], None]
) -> tuple[dict[str, Any], list[Any]]:
    greedy = teacher.config.label_source == "greedy"
    answers: dict[str, list[int]] = {}
    defects: list[Any] = []
    cut = 0
    for batch in batches_of(samples, teacher.config, by_length=False):
        ready = teacher.prepare(batch, file)
        defects += ready.defects
        inputs, answer_BN = ready.inputs, ready.answer_BN
        if ready.samples and greedy:
            inputs, answer_BN = teacher.answer(inputs)
            cut += int((~teacher.ends_answer(inputs, answer_BN).any(1)).sum())
        for row, sample in enumerate(ready.samples):
            answers[sample.id] = inputs["input_ids"][row][answer_BN[row]].tolist()
        progress(len(batch))
    notes = {"answers_generated": len(answers) if greedy else 0, "answers_cut": cut}
    return {"answers": answers, "dropped": [str(one) for one in defects], "notes": notes}, defects


def _check_manifest(folder: Path, fingerprint: Mapping[str, str], processes: Processes) -> None:
    """Write what the labels are made from, or refuse a folder that was made from something else."""
    path = folder / MANIFEST
    # Labels are the un-adapted model's: the adapter, which training changes, is no part of them.
    mine = {
        name: value for name, value in fingerprint.items() if name not in ("backbone_weights", "features")
    }
    if path.is_file():
        stored = _read(path) or {}
        # Earlier ones were decoded as today's are, but their end tokens were not written down.
        stored = {**{name: value for name, value in mine.items() if name == "decoding"}, **stored}
        if differing := [name for name in {**stored, **mine} if stored.get(name) != mine.get(name)]:
            listed = "; ".join(
                f"{name}: stored {stored.get(name)!r}, this run {mine.get(name)!r}" for name in differing
            )
            raise CheckpointError(
                f"the answers in {folder} belong to another run ({listed}). Remove that folder, or choose "
                "another output folder"
            )
    processes.barrier()
    if processes.first and not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(mine, indent=2) + "\n")
    processes.barrier()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None

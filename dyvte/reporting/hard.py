"""The hard subset in words and tables."""

from __future__ import annotations

from collections.abc import Iterator

from dyvte.comparison.hard import HardSubset, hard_subset, is_pooled
from dyvte.reporting.sections import Section


def hard_subsets(section: Section, *, num_draws: int, seed: int) -> Iterator[HardSubset]:
    """One for each pooled run beside the full model's; none where nothing can be graded."""
    if section.full is None or section.full.hits is None:
        return
    hits = {run.name: run.hits for run in section.runs if run.hits is not None}
    for run in section.runs:
        about = run.scores.run
        if run.hits is not None and is_pooled(about.policy, about.reduction):
            found = hard_subset(
                section.questions,
                hits,
                section.full.name,
                run.name,
                about.reduction,
                num_draws=num_draws,
                seed=seed,
            )
            if found is not None:
                yield found


def hard_rows(found: HardSubset) -> list[list[str]]:
    """A row for each run: what it solves of the subset, with its interval."""
    return [[name, f"{one.solved:.1f} [{one.low:.1f}, {one.high:.1f}]"] for name, one in found.scores.items()]


HARD_HEADER = ["policy", "solved, % [95 %]"]


def hard_note(found: HardSubset, unit: str) -> str:
    """What the subset is."""
    return (
        f"Hard subset: {found.num_questions} of {found.num_all} questions, which the full model solves and "
        f"the model with {found.pooled} does not ({found.num_units} {unit}s, resampled). These two chose it: "
        "full 100, pooled 0; the others are to be compared with each other."
    )

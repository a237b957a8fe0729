"""What LLaVA's evaluation appends to questions."""

from __future__ import annotations

SHORT_ANSWER_SUFFIX = "\nAnswer the question using a single word or phrase."
"""What LLaVA's evaluation appends to questions with a short answer."""

LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
"""What LLaVA's evaluation appends to multiple-choice questions."""


def strip_suffix(text: str) -> str:
    """A LLaVA question without what its authors appended."""
    for suffix in (SHORT_ANSWER_SUFFIX, LETTER_SUFFIX):
        text = text.removesuffix(suffix)
    return text.strip()

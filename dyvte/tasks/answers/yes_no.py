"""How VLMEvalKit reads yes/no answers (``YOrN_Extraction`` in ``vlmeval/dataset/utils/yorn.py``)."""

from __future__ import annotations

from dyvte.tasks.answers.vqa import without_punctuation


def yes_no_words(text: str) -> str:
    """Exactly one of the words "yes" and "no" is the answer, else "other"."""
    words = without_punctuation(text.lower(), "vlmevalkit").split()
    if ("yes" in words) == ("no" in words):
        return "other"
    return "yes" if "yes" in words else "no"

"""Relaxed accuracy of charts (Masry et al., 2022, section 5.1): numbers may be 5 % off, texts must be equal.

As pix2struct's ``metrics.py`` has it, and lmms-eval (``chartqa/utils.py``) and VLMEvalKit (``vqa_eval.py``)
after it. A number is what Python's ``float`` takes: "1,000" and "$5" are texts, "5 %" is 0.05, "nan" and
"inf" are numbers (the first equals nothing). A gold answer of 0 is compared as a text.
"""

from __future__ import annotations

TOLERANCE = 0.05


def relaxed_match(prediction: str, gold: str) -> bool:
    """Whether a prediction is right: within 5 % of a number other than 0, else equal but for letter case.

    Parameters
    ----------
    prediction, gold
        Texts.
    """
    read, expected = _number(prediction), _number(gold)
    if read is None or not expected:
        return prediction.lower() == gold.lower()
    return abs(read - expected) / abs(expected) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None

"""Which objects a caption names, by CHAIR's rules (Rohrbach et al., 2018): ``utils/chair.py`` of its
repository.

Objects and their synonyms are the user's: CHAIR's ``synonyms.txt`` for COCO, or a list for other images.
Words are brought to the singular by a small rule instead of the package ``pattern``, which CHAIR uses and
which needs Python 2: a word that is no synonym is looked up without its plural ending. That differs from
``pattern`` where it breaks words ("bus" becomes "bu" there and is not seen, "canoes" become "cano").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_TOKEN = re.compile(r"\w+(?:-\w+)*|'\w+|[^\w\s]")
_IRREGULAR = {
    "people": "person",
    "children": "child",
    "men": "man",
    "women": "woman",
    "mice": "mouse",
    "geese": "goose",
    "oxen": "ox",
    "feet": "foot",
    "teeth": "tooth",
}
_ENDINGS = (
    ("children", ("child",)),
    ("ies", ("y", "ie")),
    ("ves", ("f", "fe", "ve")),
    ("es", ("e", "")),
    ("s", ("",)),
    ("men", ("man",)),
)
_ANIMALS = (
    *("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub"),
)


@dataclass(frozen=True)
class Objects:
    """What a caption may name.

    Attributes
    ----------
    name_of : dict of str to str
        The object that each synonym is one of, itself included.
    pairs : dict of str to str
        Two words that are read as one, by what they are read as.
    words : frozenset of str
        Every word of a synonym: these are no plurals of others.
    """

    name_of: dict[str, str]
    pairs: dict[str, str]
    words: frozenset[str]

    @classmethod
    def of(cls, lines: Iterable[Sequence[str]]) -> Objects:
        """From lists of synonyms, the object's name first; of a synonym that stands twice the last holds."""
        name_of = {word.strip().lower(): line[0].strip().lower() for line in lines for word in line}
        # what COCO's captions say beside an object without meaning another: a baby bird is no person
        pairs = {f"{age} {animal}": animal for animal in _ANIMALS for age in ("baby", "adult")}
        pairs |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
        pairs |= {"home plate": "home plate"}
        pairs |= {word: word for word in name_of if word.count(" ") == 1}
        pairs |= {"bow tie": "tie", "toilet seat": "toilet"}
        return cls(name_of, pairs, frozenset(part for word in name_of for part in word.split()))

    def named(self, caption: str) -> list[str]:
        """The objects that a caption names, in order, each as often as it is named."""
        words = list(self._joined([self._singular(word) for word in _TOKEN.findall(caption.lower())]))
        if "toilet" in words and "seat" in words:  # "the seat of the toilet" is no chair
            words = [word for word in words if word != "seat"]
        return [self.name_of[word] for word in words if word in self.name_of]

    def _singular(self, word: str) -> str:
        if word in self.words:
            return word
        if word in _IRREGULAR:
            return _IRREGULAR[word]
        for ending, others in _ENDINGS:
            if word.endswith(ending):
                stem = word.removesuffix(ending)
                found = next((stem + other for other in others if stem + other in self.words), None)
                if found:
                    return found
        return word

    def _joined(self, words: Sequence[str]) -> Iterator[str]:
        at = 0
        while at < len(words):
            pair = self.pairs.get(" ".join(words[at : at + 2])) if at + 1 < len(words) else None
            yield pair or words[at]
            at += 2 if pair else 1

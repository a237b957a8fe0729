"""One record of conversation data, whatever its layout, as an image and the texts of its turns.

Read are LLaVA's ``{"image", "conversations": [{"from", "value"}, ...]}`` and what most trainers write today,
``{"images", "messages": [{"role", "content"}, ...]}``, where ``content`` is text or a list of parts such as
``{"type": "image"}`` and ``{"type": "text", "text": ...}``. What looks like an image and is not read is a
defect: a record is text-only where it shows none, never because its key has another name.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, replace
from typing import Any

from dyvte.data.defects import Unusable, check_text
from dyvte.data.samples import EmbeddedImage

IMAGE_PLACEHOLDER = "<image>"
IMAGE_KEYS = ("image", "images", "image_path", "image_paths", "image_file")
"""Keys of a record that hold its image."""

TURN_KEYS = ("conversations", "messages")
_WHO_AND_WHAT = (("from", "value"), ("role", "content"))
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_ADDRESS = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_DATA_ADDRESS = re.compile(r"^data:[^,;]*(?:;[^,;]*)*;base64,", re.IGNORECASE)
_IMAGE_NAME = re.compile(
    r"\.(?:png|jpe?g|jfif|webp|gif|bmp|tiff?|avif|heic|heif|ppm|pgm|jp2|tga|ico)(?:\?\S*)?$", re.IGNORECASE
)

Given = str | EmbeddedImage


class SeveralImages(Unusable):
    """A record with more than one image; they are counted."""


@dataclass(frozen=True)
class Turn:
    """What one side says, with the names that the record gives it, for messages."""

    text: str
    who: Any
    where: str
    """Its place in the record, such as ``messages[2]``."""
    who_key: str
    text_key: str
    images: tuple[Any, ...] = ()
    """Images that its parts bring themselves."""

    @property
    def role(self) -> str | None:
        """human, gpt or system; None for any other."""
        return _ROLES.get(self.who) if isinstance(self.who, str) else None

    @property
    def field(self) -> str:
        """The field that holds its text."""
        return f"{self.where}.{self.text_key}"


@dataclass(frozen=True)
class Conversation:
    """A record of sound structure.

    Attributes
    ----------
    image
        A path as the record gives it, or the encoded bytes; None for text only.
    turns
        Human first; without the image placeholder where there is an image.
    system
        The record's own system prompt; "" for none.
    moved_placeholder
        Whether the placeholder stood inside a sentence.
    """

    image: Given | None
    turns: list[Turn]
    system: str = ""
    moved_placeholder: bool = False


def parse_record(entry: Any) -> Conversation:
    """The conversation of a record.

    Raises
    ------
    Unusable
        Naming the field that cannot be used.
    """
    if not isinstance(entry, dict):
        raise Unusable("entry", f"expected a JSON object, found {type(entry).__name__}")
    turns = _turns(entry)
    images = _images_of(entry, turns)
    if len(images) > 1:
        raise SeveralImages(_image_key(entry), f"{len(images)} images, one per sample is supported")
    _check_other_media(entry, has_image=bool(images))
    system = ""
    if turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
        if not turns:
            raise Unusable("messages[0]", "a system prompt alone is no conversation")
        check_text(system, "system prompt")
    if not images:
        _check_text_only(turns)
        return Conversation(None, turns, system)
    for position, turn in enumerate(turns):
        _check_role(turn, position)
    _check_placeholders(turns)
    question = turns[0].text.strip()
    outer = question.startswith(IMAGE_PLACEHOLDER) or question.endswith(IMAGE_PLACEHOLDER)
    asked = replace(turns[0], text=turns[0].text.replace(IMAGE_PLACEHOLDER, "").strip())
    return Conversation(_as_given(images[0], _image_key(entry)), [asked, *turns[1:]], system, not outer)


def _turns(entry: dict[str, Any]) -> list[Turn]:
    given = [key for key in TURN_KEYS if entry.get(key) is not None]
    if len(given) > 1:
        raise Unusable(given[1], f"the record has {given[0]} and {given[1]}: which of them is meant?")
    key = given[0] if given else TURN_KEYS[0]
    turns = entry.get(key)
    if isinstance(turns, dict):
        # a list of objects as some versions of datasets store it: an object of lists
        for who, what in _WHO_AND_WHAT:
            if isinstance(turns.get(who), list) and isinstance(turns.get(what), list):
                pairs = zip(turns[who], turns[what], strict=False)
                turns = [{who: one, what: text} for one, text in pairs]
                break
    if not isinstance(turns, list) or not turns:
        raise Unusable(key, "expected a non-empty list of turns, as conversations or messages")
    return [_turn(turn, f"{key}[{position}]") for position, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> Turn:
    for who, what in _WHO_AND_WHAT:
        if isinstance(turn, dict) and turn.get(who) is not None and what in turn:
            text, images = turn[what], ()
            if what == "content" and isinstance(text, list):
                text, images = _joined(text, f"{where}.{what}")
            if not isinstance(text, str):
                raise Unusable(f"{where}.{what}", f"expected text, found {type(text).__name__}")
            return Turn(text, turn[who], where, who, what, images)
    raise Unusable(where, 'expected {"from": ..., "value": text} or {"role": ..., "content": ...}')


def _joined(parts: list[Any], where: str) -> tuple[str, tuple[Any, ...]]:
    """Text of the parts one behind the other, as chat templates join them, each image as a placeholder; and
    the images that they bring themselves."""
    text, images = "", []
    for position, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url"):
            text += IMAGE_PLACEHOLDER
            names = ("image", "image_url", "url", "path")
            brought = next((part[name] for name in names if part.get(name) not in (None, "")), None)
            images += [] if brought is None else [brought]
        else:
            raise Unusable(
                f"{where}[{position}]", f'expected a part of type "text" or "image", found {_shown(part)}'
            )
    return text, tuple(images)


def _check_role(turn: Turn, position: int) -> None:
    expected = "human" if position % 2 == 0 else "gpt"
    if turn.role != expected:
        problem = f"expected {expected!r}, found {turn.who!r}"
        if position == 0:
            problem = f"the conversation starts with {turn.who!r}, expected 'human'"
        raise Unusable(f"{turn.where}.{turn.who_key}", problem)


def _check_text_only(turns: list[Turn]) -> None:
    """A conversation without an image may speak of the placeholder, but no placeholder may stand there for a
    image that is not given. Such conversations of mix665k may start with gpt: nobody asks them for a
    prompt."""
    for turn in turns:
        text = turn.text.strip()
        if text.startswith(IMAGE_PLACEHOLDER) or text.endswith(IMAGE_PLACEHOLDER):
            raise Unusable("image", f"the text holds {IMAGE_PLACEHOLDER} but no image is given")


def _check_placeholders(turns: list[Turn]) -> None:
    total = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if total > 1:
        key = turns[0].where.partition("[")[0]
        raise SeveralImages(key, f"{total} {IMAGE_PLACEHOLDER}, one image per sample is supported")
    if IMAGE_PLACEHOLDER not in turns[0].text:
        problem = f"an image is given, but the first question holds no {IMAGE_PLACEHOLDER}"
        elsewhere = next((turn.where for turn in turns if IMAGE_PLACEHOLDER in turn.text), None)
        raise Unusable(turns[0].field, problem + (f": it stands in {elsewhere}" if elsewhere else ""))


def _image_key(entry: dict[str, Any]) -> str:
    return next((key for key in IMAGE_KEYS if entry.get(key) not in (None, "", [])), "image")


def _images_of(entry: dict[str, Any], turns: list[Turn]) -> list[Any]:
    """The images that are there; the same under two keys, or under a key and in a turn, count once."""
    groups: list[list[Any]] = []
    given = [entry.get(key) for key in IMAGE_KEYS]
    for one in [*given, [image for turn in turns for image in turn.images]]:
        listed = one if isinstance(one, list) else [one]
        group = [image for image in listed if image not in (None, "", {"bytes": None, "path": None})]
        if group and group not in groups:
            groups.append(group)
    return [image for group in groups for image in group]


def _as_given(image: Any, key: str) -> Given:
    """An image's path or bytes out of text, bytes, ``{"bytes", "path"}`` or ``{"url"}``."""
    if isinstance(image, dict):
        data = image.get("bytes")
        name = next((image[one] for one in ("path", "url") if image.get(one) is not None), None)
        if data is not None:
            return EmbeddedImage(_checked_bytes(data, key), str(name or "embedded image"))
        if not isinstance(name, str):
            raise Unusable(
                key, f"expected a path or image bytes, found an object of {sorted(map(str, image))}"
            )
        image = name
    if isinstance(image, bytes):
        return EmbeddedImage(image)
    if not isinstance(image, str):
        raise Unusable(key, f"expected a path or image bytes, found {type(image).__name__}")
    if _DATA_ADDRESS.match(image):
        return EmbeddedImage(_decoded(image, key))
    if image.startswith("file://"):
        image = image.removeprefix("file://")
    if _ADDRESS.match(image):
        raise Unusable(key, f"{_shown(image)} is an address: download the image and give its path")
    check_text(image, key)
    return image


def _checked_bytes(data: Any, key: str) -> bytes:
    if not isinstance(data, bytes):
        raise Unusable(key, f"expected the bytes of an image, found {type(data).__name__}")
    return data


def _decoded(address: str, key: str) -> bytes:
    try:
        return base64.b64decode(address[address.index(",") + 1 :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unusable(key, f"the data: address does not hold base64 ({error})") from error


def _check_other_media(entry: dict[str, Any], *, has_image: bool) -> None:
    """Raise Unusable for what is no text and is not read."""
    for key in _OTHER_MEDIA:
        if entry.get(key) not in (None, "", []):
            raise Unusable(key, f"{key} is not read: gates learn from one image per sample")
    if has_image:
        return
    for key, value in entry.items():
        if key not in TURN_KEYS and key != "id" and _looks_like_image(value):
            raise Unusable(str(key), f"looks like an image, but is not read: call it {IMAGE_KEYS[0]}")


def _looks_like_image(value: Any) -> bool:
    if isinstance(value, list):
        return any(_looks_like_image(one) for one in value if not isinstance(one, list))
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes) or _looks_like_image(value.get("path"))
    if isinstance(value, str):
        return bool(_DATA_ADDRESS.match(value)) or bool(_IMAGE_NAME.search(value[-300:]) and " " not in value)
    return isinstance(value, bytes)


def _shown(value: Any, longest: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]} ..."

"""What a client may ask, read from JSON: OpenAI's chat completions, and ``visual_exit``.

A field is either read, or known and refused unless it asks for nothing, or unknown and refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dyvte.serving.errors import RequestError
from dyvte.serving.fields import Fields, kind
from dyvte.serving.jobs import Decoding
from dyvte.serving.schedules import WISHES, ScheduleWish

_READ = (
    *(
        "model",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "n",
        "stop",
        "seed",
    ),
    *("stream", "stream_options", "logprobs", "top_logprobs", "visual_exit"),
)
# Accepted and without effect: they say who asks, not what.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Known of OpenAI and of other servers, and not served; these values ask for nothing.
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "top_k": (-1, 0),
    "min_p": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "best_of": (1,),
    "echo": (False,),
    "skip_special_tokens": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "generation_config": (),
}
MAX_STOPS, MAX_STOP_LENGTH, MAX_TOP_LOGPROBS = 16, 256, 20
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Exchange:
    """What the user said in one turn, and what was answered; None for the turn that is asked now.

    ``images`` are URLs, each with its path in the request.
    """

    text: str
    images: tuple[tuple[str, str], ...] = ()
    answer: str | None = None


@dataclass(frozen=True)
class ChatRequest:
    """A request for chat completions.

    Attributes
    ----------
    model
        The name that the client gives the model; None: whichever there is.
    system
        A system prompt, or "".
    exchanges
        The conversation; the last has no answer.
    decoding
        How tokens are chosen.
    wish
        The schedule asked for.
    shares_images
        May images be read that were asked about before?
    num_choices
        n.
    stream, include_usage
        Answer in events; with the tokens counted in the last.
    """

    model: str | None
    system: str
    exchanges: tuple[Exchange, ...]
    decoding: Decoding
    wish: ScheduleWish
    shares_images: bool = True
    num_choices: int = 1
    stream: bool = False
    include_usage: bool = False


def parse_json(body: bytes) -> Any:
    """The JSON value of a request's body.

    Raises
    ------
    RequestError
        If it is none.
    """
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the body is not UTF-8: {error.reason} at byte {error.start}", code="invalid_json"
        ) from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        text = str(error) if len(str(error)) < 200 else f"{str(error)[:200]}..."
        if "digits" in text and not isinstance(error, json.JSONDecodeError):  # Python's own advice
            text = "a number of too many digits"
        raise RequestError(f"the body is not valid JSON: {text}", code="invalid_json") from error


def parse_chat(values: Any, *, max_choices: int, max_images: int) -> ChatRequest:
    """A request from what was parsed from JSON.

    Raises
    ------
    RequestError
        Naming the field; status 422 for one that is unknown.
    """
    fields = Fields(values)
    fields.check_known({*_READ, *_IGNORED, *_NOTHING})
    for name, nothing in _NOTHING.items():
        value = fields.values.get(name)
        if value is not None and not any(value == one and type(value) is type(one) for one in nothing):
            raise fields.error(
                name, "this server knows the field, but cannot do what it asks", code="unsupported"
            )
    system, exchanges = _conversation(fields, max_images)
    stream = fields.flag("stream")
    wish, shares_images = _wish(fields)
    return ChatRequest(
        model=fields.text("model"),
        system=system,
        exchanges=exchanges,
        decoding=_decoding(fields),
        wish=wish,
        shares_images=shares_images,
        num_choices=fields.whole("n", 1, max_choices) or 1,
        stream=stream,
        include_usage=_include_usage(fields, stream),
    )


def _decoding(fields: Fields) -> Decoding:
    limits = [fields.whole(name, 1, _LARGEST) for name in ("max_completion_tokens", "max_tokens")]
    given = [limit for limit in limits if limit is not None]
    top = fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if not fields.flag("logprobs"):
        if top:
            raise fields.error("top_logprobs", "needs logprobs: true")
        top = None
    else:
        top = top or 0
    top_p = fields.number("top_p", 0.0, 1.0)
    if top_p == 0:
        raise fields.error("top_p", "0: expected more than 0, up to 1")
    return Decoding(
        max_tokens=min(given) if given else None,
        temperature=fields.number("temperature", 0.0, 2.0) or 0.0,
        top_p=1.0 if top_p is None else top_p,
        seed=fields.whole("seed", -(2**63), 2**63 - 1),
        stop=_stops(fields),
        top_logprobs=top,
    )


def _stops(fields: Fields) -> tuple[str, ...]:
    given = fields.values.get("stop")
    stops = given if isinstance(given, list) else [given] if given is not None else []
    if len(stops) > MAX_STOPS:
        raise fields.error("stop", f"{len(stops)} texts: expected at most {MAX_STOPS}")
    for stop in stops:
        if not isinstance(stop, str):
            raise fields.error("stop", f"expected a text or a list of texts, found {kind(stop)}")
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise fields.error("stop", f"a text of {len(stop)} characters: expected 1..{MAX_STOP_LENGTH}")
    return tuple(stops)


def _include_usage(fields: Fields, stream: bool) -> bool:
    given = fields.values.get("stream_options")
    if given is None:
        return False
    if not stream:
        raise fields.error("stream_options", "needs stream: true")
    options = Fields(given, "stream_options")
    options.check_known(("include_usage", "include_obfuscation"))
    return options.flag("include_usage")


def _wish(fields: Fields) -> tuple[ScheduleWish, bool]:
    """The schedule asked for, and whether images may be shared."""
    given = fields.values.get("visual_exit")
    if given is None:
        return ScheduleWish(), True
    wish = Fields(given, "visual_exit")
    wish.check_known((*WISHES, "share_images"))
    shares = wish.flag("share_images") or wish.values.get("share_images") is None
    asked = ScheduleWish(
        policy=wish.text("policy"),
        threshold=wish.number("threshold", 0.0, 1.0),
        max_risk=wish.number("max_risk", 0.0, 1.0),
        budget=wish.number("budget", 0.0, 1.0),
    )
    return asked, shares


def _conversation(fields: Fields, max_images: int) -> tuple[str, tuple[Exchange, ...]]:
    """System prompt and exchanges; what one side says in a row is one turn."""
    messages = fields.items("messages")
    if not messages:
        raise fields.error("messages", "expected at least one message")
    systems: list[str] = []
    turns: list[tuple[str, list[str], list[tuple[str, str]]]] = []
    for index, given in enumerate(messages):
        message = Fields(given, f"messages[{index}]")
        role = message.text("role")
        if role in ("tool", "function"):
            raise message.error("role", f"{role}: this server calls no tools", code="unsupported")
        if role not in ("system", "developer", "user", "assistant"):
            raise message.error("role", f"{_quoted(role)}: expected system, user or assistant")
        text, images = _content(message, role)
        if role in ("system", "developer"):
            if turns:
                raise message.error("role", f"{role}: expected before the first message of the user")
            systems.append(text)
        elif turns and turns[-1][0] == role:
            turns[-1][1].append(text)
            turns[-1][2].extend(images)
        else:
            turns.append((role, [text], images))
    if not turns or turns[0][0] != "user" or turns[-1][0] != "user":
        raise fields.error(
            "messages", "expected a conversation that begins and ends with a message of the user"
        )
    if (count := sum(len(images) for _, _, images in turns)) > max_images:
        raise fields.error("messages", f"{count} images: expected at most {max_images}")
    said = [(role, "\n".join(text for text in texts if text), tuple(images)) for role, texts, images in turns]
    exchanges = [
        Exchange(text, images, answer) for (_, text, images), (_, answer, _) in zip(said[::2], said[1::2])
    ]
    _, text, images = said[-1]
    if not text.strip() and not images:
        raise fields.error("messages", "the last message is empty")
    return "\n".join(systems), (*exchanges, Exchange(text, images))


def _content(message: Fields, role: str) -> tuple[str, list[tuple[str, str]]]:
    """A message's text and the URLs of its images."""
    known = ["role", "content", "name", "refusal", "tool_calls", "function_call", "audio", "annotations"]
    message.check_known(known)
    for name in ("tool_calls", "function_call", "audio"):
        if message.values.get(name):
            raise message.error(name, "this server knows the field, but cannot serve it", code="unsupported")
    content = message.values.get("content")
    if isinstance(content, str):
        return message.text("content") or "", []
    if not isinstance(content, list):
        raise message.error("content", f"expected a text or a list of parts, found {kind(content)}")
    texts: list[str] = []
    images: list[tuple[str, str]] = []
    for index, given in enumerate(content):
        part = Fields(given, f"{message.at('content')}[{index}]")
        what = part.text("type")
        if what == "text":
            part.check_known(("type", "text"))
            texts.append(_required(part, "text"))
        elif what == "image_url":
            part.check_known(("type", "image_url"))
            if role != "user":
                raise part.error("type", f"image_url: a message of {role} cannot hold images")
            images.append(_image_url(part))
        elif what in ("input_audio", "video_url", "file", "refusal", "audio_url", "input_image", "image"):
            raise part.error("type", f"{what}: only text and image_url are served", code="unsupported")
        else:
            raise part.error("type", f"{_quoted(what)}: expected text or image_url")
    return "\n".join(texts), images


def _image_url(part: Fields) -> tuple[str, str]:
    given = part.values.get("image_url")
    if isinstance(given, str):  # some clients leave the object out
        return given, part.at("image_url")
    image = Fields(given, part.at("image_url"))
    image.check_known(("url", "detail"))
    detail = image.text("detail")
    if detail not in (None, "auto", "low", "high", "original"):
        raise image.error("detail", f"{_quoted(detail)}: expected auto, low or high (none has any effect)")
    return _required(image, "url"), image.at("url")


def _required(fields: Fields, name: str) -> str:
    value = fields.text(name)
    if value is None:
        raise fields.error(name, "expected a text, found nothing")
    return value


def _quoted(value: str | None) -> str:
    if value is None:
        return "nothing"
    return repr(value if len(value) <= 60 else f"{value[:60]}...")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")

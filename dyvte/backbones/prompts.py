"""Prompt texts: the LLaVA v1 conversation, and the processor's own chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dyvte.errors import ConfigError, DataError

# Earlier exchanges of a conversation: (question, answer) each.
History = Sequence[tuple[str, str]]
# Images of a prompt: whether there is one, how many before the first question, or how many before each.
Images = bool | int | Sequence[int]

# LLaVA conversation "vicuna_v1" (llava/conversation.py): the text LLaVA-1.5 was trained with.
V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as text, image placeholders not yet expanded.

    Attributes
    ----------
    text
        The whole text; with an answer it ends with the EOS text.
    answer_start
        Offset at which the answer begins, the space that joins it to the prompt included: where a tokenizer
        makes it a token of its own, the model has to say it. None without an answer.
    """

    text: str
    answer_start: int | None = None


class PromptTemplate(Protocol):
    """Turns one question (and its answer) into text."""

    version: str

    def render(
        self,
        question: str,
        answer: str | None = None,
        has_image: Images = True,
        history: History = (),
        system: str = "",
    ) -> RenderedPrompt:
        """A prompt.

        Parameters
        ----------
        question, answer
            The exchange that is asked. With an answer, the EOS text follows it.
        has_image
            May also be the number of images, which come before the conversation's first question; or one
            number for each question, that of the images before it.
        history
            The exchanges before it; their answers are part of the prompt.
        system
            A system prompt of the conversation's own; "": the template's, if it has one.

        Raises
        ------
        DataError
            If a text holds a special token, which the tokenizer would read as one, if an answer is empty, or
            if the template changes a text.
        """
        ...


def images_before(has_image: Images, questions: int) -> list[int]:
    """How many images stand before each of a conversation's questions.

    Raises
    ------
    DataError
        If numbers are given, but not one for each question.
    """
    if isinstance(has_image, int):
        return [int(has_image)] + [0] * (questions - 1)
    if len(has_image) != questions:
        raise DataError(f"{len(has_image)} numbers of images for {questions} questions: expected one each")
    return [int(count) for count in has_image]


@dataclass(frozen=True)
class V1Template:
    """``SYSTEM USER: <image>\\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>``, system prompt included.

    Texts are taken as they are, white space included, as the original does.
    """

    image_token: str
    eos: str
    version: str = "v1"
    special: tuple[str, ...] = ()
    """Other special tokens of the tokenizer."""

    def render(
        self,
        question: str,
        answer: str | None = None,
        has_image: Images = True,
        history: History = (),
        system: str = "",
    ) -> RenderedPrompt:
        """See `PromptTemplate.render`."""
        _check_text(question, answer, history, system, self)
        shown = [f"{self.image_token}\n" * count for count in images_before(has_image, len(history) + 1)]
        prompt = f"{system or V1_SYSTEM} "
        for images, (earlier_question, earlier_answer) in zip(shown, history):
            prompt += f"USER: {images}{earlier_question} ASSISTANT: {earlier_answer}{self.eos}"
        prompt += f"USER: {shown[-1]}{question} ASSISTANT:"
        if answer is None:
            return RenderedPrompt(prompt)
        return RenderedPrompt(f"{prompt} {answer}{self.eos}", len(prompt))


@dataclass(frozen=True)
class ChatTemplate:
    """The processor's chat template; the answer ends with EOS even where the template forgets it.

    Texts lose their outer white space, as many templates take it away themselves.
    """

    processor: Any
    image_token: str
    eos: str
    version: str = "chat"
    special: tuple[str, ...] = ()
    """Other special tokens of the tokenizer."""

    def render(
        self,
        question: str,
        answer: str | None = None,
        has_image: Images = True,
        history: History = (),
        system: str = "",
    ) -> RenderedPrompt:
        """See `PromptTemplate.render`."""
        _check_text(question, answer, history, system, self)
        spoken = [text.strip() for exchange in history for text in exchange] + [question.strip()]
        messages = [
            {"role": "assistant" if i % 2 else "user", "content": [{"type": "text", "text": text}]}
            for i, text in enumerate(spoken)
        ]
        for message, count in zip(messages[::2], images_before(has_image, len(history) + 1), strict=True):
            message["content"] = [{"type": "image"}] * count + message["content"]
        system = system.strip()
        if system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        prompt = self._apply(messages, add_generation_prompt=True)
        named = [("history", text) for text in spoken[:-1]]
        for what, text in [("question", spoken[-1]), *named, ("system prompt", system)]:
            if text not in prompt:
                raise DataError(_changed(what, text))
        if answer is None:
            return RenderedPrompt(prompt)
        answer = answer.strip()
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        whole = self._apply([*messages, reply], add_generation_prompt=False)
        tail = whole[len(prompt) :] if whole.startswith(prompt) else f" {answer}"
        at = tail.find(answer)
        if at < 0:
            raise DataError(_changed("answer", answer))
        after = tail[at + len(answer) :]
        # Keep the template's own end of turn as far as the first EOS; later text is no label.
        closing = after[: after.find(self.eos)] + self.eos if self.eos in after else self.eos
        start = len(prompt) + at if tail[:at].strip() else len(prompt)
        return RenderedPrompt(prompt + tail[: at + len(answer)] + closing, start)

    def _apply(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )


def get_template(version: str, processor: Any) -> PromptTemplate:
    """A prompt template by name.

    "v1": LLaVA's vicuna_v1, owned here, because the template that converted LLaVA-1.5 checkpoints carry
    lacks the system prompt and the EOS. "chat": the processor's chat template. "auto": "chat" where the
    processor has a template that is not a vicuna one, else "v1".

    Parameters
    ----------
    version
        "v1", "chat" or "auto".
    processor
        With a tokenizer.

    Raises
    ------
    ConfigError
        If the name is unknown, or the processor lacks what the template needs.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    eos = getattr(tokenizer, "eos_token", None)
    image_token = getattr(processor, "image_token", None)
    if eos is None or image_token is None:
        raise ConfigError(
            "the processor must name an image token and an EOS token: it names "
            f"image_token={image_token!r}, eos_token={eos!r}"
        )
    special = special_texts(processor)
    if version == "v1":
        return V1Template(image_token, eos, special=special)
    if version not in ("chat", "auto"):
        raise ConfigError(f"prompt template {version!r}: expected 'v1', 'chat' or 'auto'")
    if getattr(processor, "chat_template", None) is None:
        if version == "auto":
            return V1Template(image_token, eos, special=special)
        raise ConfigError("template 'chat' was asked for, but the processor has no chat template: use 'v1'")
    chat = ChatTemplate(processor, image_token, eos, special=special)
    try:
        probe = chat.render("probe").text
        if version == "auto" and _is_vicuna(probe, image_token):
            return V1Template(image_token, eos, special=special)
        chat.render("probe", "answer")
    except DataError as error:  # with texts as plain as these, it is no sample's fault
        raise ConfigError(str(error)) from error
    return chat


def _is_vicuna(probe: str, image_token: str) -> bool:
    """USER: and ASSISTANT:, and nothing of the template's own around the image (LISA marks its ends)."""
    image = re.search(rf"USER:\s*{re.escape(image_token)}\s", probe)
    return image is not None and "ASSISTANT:" in probe


def special_texts(processor: Any) -> tuple[str, ...]:
    """Texts that a tokenizer reads as special tokens wherever they stand: turn marks, placeholders of images
    and videos, padding. Without "unknown", which stands for nothing."""
    tokenizer = getattr(processor, "tokenizer", None)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    texts = {str(token) for token in added.values() if getattr(token, "special", False)}
    texts |= set(getattr(tokenizer, "all_special_tokens", ()))
    texts |= {getattr(processor, name, None) for name in ("image_token", "video_token", "audio_token")}
    unknown = getattr(tokenizer, "unk_token", None)
    return tuple(sorted(text for text in texts if isinstance(text, str) and text.strip() and text != unknown))


def _changed(what: str, text: str) -> str:
    return (
        f"the chat template dropped or changed the {what} {text[:60]!r}: use another text, or template 'v1' "
        "for this backbone"
    )


def _check_text(question: str, answer: str | None, history: History, system: str, template: Any) -> None:
    texts = [("question", question), ("answer", answer or ""), ("system prompt", system)]
    texts += [("history", text) for exchange in history for text in exchange]
    meanings = {template.image_token: "image placeholder", template.eos: "end-of-sequence text"}
    for name, text in texts:
        for token in (template.image_token, template.eos, *template.special):
            if token in text:
                what = meanings.get(token, "special token")
                raise DataError(f"the {name} contains the {what} {token!r}: strip it, the template adds it")
    if (answer is not None and not answer.strip()) or any(not text.strip() for _, text in history):
        raise DataError("the answer is empty: a sample without an answer token cannot be used")

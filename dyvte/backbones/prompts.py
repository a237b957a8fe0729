"""Prompt texts: the LLaVA v1 conversation, and the processor's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dyvte.errors import ConfigError, DataError

# Earlier exchanges of a conversation: (question, answer) each.
History = Sequence[tuple[str, str]]

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
        has_image: bool | int = True,
        history: History = (),
    ) -> RenderedPrompt:
        """A prompt.

        Parameters
        ----------
        question, answer
            The exchange that is asked. With an answer, the EOS text follows it.
        has_image
            May also be the number of images; they come before the conversation's first question.
        history
            The exchanges before it; their answers are part of the prompt.

        Raises
        ------
        DataError
            If the text holds the image placeholder or the EOS text, or an answer is empty.
        """
        ...


@dataclass(frozen=True)
class V1Template:
    """``SYSTEM USER: <image>\\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>``, system prompt included.

    Texts are taken as they are, white space included, as the original does.
    """

    image_token: str
    eos: str
    version: str = "v1"

    def render(
        self,
        question: str,
        answer: str | None = None,
        has_image: bool | int = True,
        history: History = (),
    ) -> RenderedPrompt:
        """See `PromptTemplate.render`."""
        _check_text(question, answer, history, (self.image_token, self.eos))
        prompt, images = f"{V1_SYSTEM} ", f"{self.image_token}\n" * int(has_image)
        for earlier_question, earlier_answer in history:
            prompt += f"USER: {images}{earlier_question} ASSISTANT: {earlier_answer}{self.eos}"
            images = ""
        prompt += f"USER: {images}{question} ASSISTANT:"
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

    def render(
        self,
        question: str,
        answer: str | None = None,
        has_image: bool | int = True,
        history: History = (),
    ) -> RenderedPrompt:
        """See `PromptTemplate.render`."""
        _check_text(question, answer, history, (self.image_token, self.eos))
        spoken = [text.strip() for exchange in history for text in exchange] + [question.strip()]
        messages = [
            {"role": "assistant" if i % 2 else "user", "content": [{"type": "text", "text": text}]}
            for i, text in enumerate(spoken)
        ]
        messages[0]["content"] = [{"type": "image"}] * int(has_image) + messages[0]["content"]
        prompt = self._apply(messages, add_generation_prompt=True)
        for text in reversed(spoken):
            if text not in prompt:
                what = "question" if text == spoken[-1] else "history"
                raise ConfigError(
                    f"the chat template dropped or changed the {what}: use template 'v1' for this backbone"
                )
        if answer is None:
            return RenderedPrompt(prompt)
        answer = answer.strip()
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        whole = self._apply([*messages, reply], add_generation_prompt=False)
        tail = whole[len(prompt) :] if whole.startswith(prompt) else f" {answer}"
        at = tail.find(answer)
        if at < 0:
            raise ConfigError(
                f"the chat template changed the answer {answer!r}: use template 'v1' for this backbone"
            )
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
    if version == "v1":
        return V1Template(image_token, eos)
    if version not in ("chat", "auto"):
        raise ConfigError(f"prompt template {version!r}: expected 'v1', 'chat' or 'auto'")
    if getattr(processor, "chat_template", None) is None:
        if version == "auto":
            return V1Template(image_token, eos)
        raise ConfigError("template 'chat' was asked for, but the processor has no chat template: use 'v1'")
    chat = ChatTemplate(processor, image_token, eos)
    if version == "auto" and "USER:" in (probe := chat.render("probe").text) and "ASSISTANT:" in probe:
        return V1Template(image_token, eos)
    return chat


def _check_text(question: str, answer: str | None, history: History, special: tuple[str, str]) -> None:
    texts = [("question", question), ("answer", answer or "")]
    texts += [("history", text) for exchange in history for text in exchange]
    for name, text in texts:
        for token, what in zip(special, ("image placeholder", "end-of-sequence text"), strict=True):
            if token in text:
                raise DataError(f"the {name} contains the {what} {token!r}: strip it, the template adds it")
    if (answer is not None and not answer.strip()) or any(not text.strip() for _, text in history):
        raise DataError("the answer is empty: a sample without an answer token cannot be used")

"""Prompt texts against the published LLaVA conversation, and answer masks against the decoded tokens."""

import pytest

from dyvte.backbones import encode, get_template
from dyvte.errors import ConfigError, DataError

from .batches import llava
from .models import random_image, tiny_processor

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA_CHAT = (
    "{% for m in messages %}{{ m['role'].upper() }}: "
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def test_v1_is_the_text_llava_was_trained_with():
    # conversation.py, vicuna_v1, one turn
    template = get_template("v1", tiny_processor())
    question, answer = "What is this?\nAnswer in one word.", "A cat"
    assert template.render(question).text == f"{SYSTEM} USER: <image>\n{question} ASSISTANT:"
    assert template.render(question, has_image=False).text == f"{SYSTEM} USER: {question} ASSISTANT:"
    rendered = template.render(question, answer)
    assert rendered.text == f"{SYSTEM} USER: <image>\n{question} ASSISTANT: {answer}</s>"
    assert rendered.text[rendered.answer_start :] == f"{answer}</s>"
    assert template.render(question, has_image=2).text.count("<image>\n") == 2


def test_chat_uses_the_processors_template():
    template = get_template("chat", tiny_processor())
    assert template.render("what color").text == "<s>user <image> what color assistant"
    rendered = template.render("what color", "red")
    assert rendered.text == "<s>user <image> what color assistant red</s>"
    assert rendered.text[rendered.answer_start :] == "red</s>"
    assert template.render("what", has_image=False).text == "<s>user what assistant"


def test_chat_adds_the_end_that_a_template_forgets():
    processor = tiny_processor()
    processor.chat_template = VICUNA_CHAT
    rendered = get_template("chat", processor).render("what", "red")
    assert rendered.text == "USER: <image>\nwhat ASSISTANT: red</s>"
    assert rendered.text[rendered.answer_start :] == "red</s>"


def test_chat_keeps_a_templates_end_of_turn_up_to_the_first_eos():
    processor = tiny_processor()
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'][-1]['text'] }}"
        "{% if m['role'] == 'assistant' %} .</s>\nnever seen{% endif %} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    rendered = get_template("chat", processor).render("what", "red", has_image=False)
    assert rendered.text == "user what assistant red .</s>"


def test_auto_prefers_chat_but_not_a_vicuna_one():
    processor = tiny_processor()
    assert get_template("auto", processor).version == "chat"
    processor.chat_template = VICUNA_CHAT
    assert get_template("auto", processor).version == "v1"
    processor.chat_template = None
    assert get_template("auto", processor).version == "v1"
    with pytest.raises(ConfigError, match="no chat template"):
        get_template("chat", processor)
    with pytest.raises(ConfigError, match="'v2'"):
        get_template("v2", processor)


def test_a_template_that_loses_the_question_is_refused():
    processor = tiny_processor()
    processor.chat_template = "{% for m in messages %}USER: {% endfor %}"
    with pytest.raises(ConfigError, match="dropped or changed the question"):
        get_template("chat", processor).render("what")


def test_texts_that_would_be_misread_are_refused():
    for version in ("v1", "chat"):
        template = get_template(version, tiny_processor())
        with pytest.raises(DataError, match="image placeholder"):
            template.render("what <image> ?")
        with pytest.raises(DataError, match="answer is empty"):
            template.render("what", "  ")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("version", ["v1", "chat"])
def test_the_answer_mask_covers_the_answer_and_its_eos_only(version, side):
    _, processor = llava()
    template = get_template(version, processor)
    samples = [
        ("what color", "red", 1),
        ("is there any circle or square ?", "yes and no", 2),
        ("how many", "one", 0),
    ]
    rendered = [template.render(q, a, has_image=n) for q, a, n in samples]
    rendered.append(template.render("what shape is it"))
    images = [[random_image(i) for i in range(n)] for _, _, n in samples] + [[random_image(9)]]
    inputs, answer = encode(processor, rendered, images, padding_side=side)
    assert inputs["attention_mask"][0, 0].item() == (1 if side == "right" else 0)
    for row, (_, text, _) in enumerate(samples):
        tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][row, answer[row]])
        assert tokens == [*text.split(), "</s>"]
    assert not answer[3].any()
    # only one BOS where the template writes it
    first = inputs["input_ids"][0, inputs["attention_mask"][0].bool()][:2].tolist()
    assert first.count(processor.tokenizer.bos_token_id) <= 1


def test_an_answer_word_that_also_stands_in_the_question_is_masked_once():
    _, processor = llava()
    rendered = [get_template("chat", processor).render("red red red", "red")]
    _, answer = encode(processor, rendered, [[random_image(0)]], padding_side="right")
    assert answer.sum().item() == 2
    assert answer[0, -2:].all()


def test_batches_that_do_not_fit_together_are_refused():
    _, processor = llava()
    template = get_template("chat", processor)
    one = template.render("what", "red")
    with pytest.raises(DataError, match="1 prompts but 2 lists"):
        encode(processor, [one], [[], []], padding_side="left")
    with pytest.raises(DataError, match="row 1: 1 image placeholders in the prompt, 0 images"):
        encode(processor, [one, one], [[random_image(0)], []], padding_side="left")
    with pytest.raises(DataError, match=r"rows \[0\] have up to 22 tokens, more than max_length 20"):
        encode(processor, [one], [[random_image(0)]], padding_side="left", max_length=20)

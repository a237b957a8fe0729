"""Prompt texts against the published LLaVA conversation, and answer masks against the decoded tokens."""

import json

import pytest

from dyvte.backbones import encode, get_template
from dyvte.errors import ConfigError, DataError
from tests.helpers.batches import llava
from tests.helpers.models import random_image, tiny_processor

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
    assert rendered.text[rendered.answer_start :] == f" {answer}</s>"
    assert template.render(question, has_image=2).text.count("<image>\n") == 2


def test_chat_uses_the_processors_template():
    template = get_template("chat", tiny_processor())
    assert template.render("what color").text == "<s>user <image> what color assistant"
    rendered = template.render("what color", "red")
    assert rendered.text == "<s>user <image> what color assistant red</s>"
    assert rendered.text[rendered.answer_start :] == " red</s>"
    assert template.render("what", has_image=False).text == "<s>user what assistant"


def test_images_may_stand_before_later_questions():
    history = [("what color", "red"), ("how many", "two")]
    v1 = get_template("v1", tiny_processor()).render("what", has_image=[1, 0, 2], history=history).text
    assert v1 == (
        f"{SYSTEM} USER: <image>\nwhat color ASSISTANT: red</s>USER: how many ASSISTANT: two</s>"
        "USER: <image>\n<image>\nwhat ASSISTANT:"
    )
    chat = get_template("chat", tiny_processor()).render("what", has_image=[0, 1, 1], history=history).text
    assert chat == (
        "<s>user what color assistant red</s><s>user <image> how many assistant two</s>"
        "<s>user <image> what assistant"
    )
    with pytest.raises(DataError, match="2 numbers of images for 3 questions"):
        get_template("v1", tiny_processor()).render("what", has_image=[1, 0], history=history)


def test_chat_adds_the_end_that_a_template_forgets():
    processor = tiny_processor()
    processor.chat_template = VICUNA_CHAT
    rendered = get_template("chat", processor).render("what", "red")
    assert rendered.text == "USER: <image>\nwhat ASSISTANT: red</s>"
    assert rendered.text[rendered.answer_start :] == " red</s>"


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


class Conversation:
    """llava/conversation.py, ``conv_vicuna_v1.get_prompt`` (SeparatorStyle.TWO), written from its text."""

    def __init__(self, turns):
        self.messages = [(("USER", "ASSISTANT")[i % 2], text) for i, text in enumerate(turns)]

    def get_prompt(self):
        text, separators = SYSTEM + " ", (" ", "</s>")
        for i, (role, message) in enumerate(self.messages):
            text += f"{role}: {message}{separators[i % 2]}" if message else f"{role}:"
        return text


def original_labels(conversation, tokenizer, legacy, image_tokens):
    """(ids, labelled) by llava/train/train.py, ``preprocess_v1``, its token counts included.

    Rounds are split at ``</s>``, instructions at " ASSISTANT: ", and their lengths are those of their own
    tokenisation; the image is one token there, here as many as the processor writes.
    """

    def tokenise(text):
        ids = []
        for i, chunk in enumerate(text.split("<image>")):
            if i:
                # The original tokenises what follows the image alone, so a non-legacy tokenizer puts a "▁" in
                # front there; over the whole text it does not, and converted checkpoints see the whole text.
                ids += tokenizer(f"<image>{chunk}", add_special_tokens=False)["input_ids"][:1] * image_tokens
                ids += tokenizer(f"<image>{chunk}", add_special_tokens=False)["input_ids"][1:]
            else:
                ids += [tokenizer.bos_token_id, *tokenizer(chunk, add_special_tokens=False)["input_ids"]]
        return ids

    ids = tokenise(conversation)
    labelled, at = [False] * len(ids), 1
    for i, part in enumerate(conversation.split("</s>")):
        if part == "":
            break
        instruction = part.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        round_length, instruction_length = len(tokenise(part)), len(tokenise(instruction)) - 2
        if i and not legacy:
            round_length, instruction_length = round_length - 1, instruction_length - 1
        for position in range(at + instruction_length, at + round_length):
            labelled[position] = True
        at += round_length
    assert at == len(ids), "the original would mask the whole sample"
    return ids, labelled


def llama_processor(legacy):
    """A LLaVA processor over a Llama tokenizer: byte-fallback BPE with ▁, legacy or not."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer, LlavaProcessor

    core = Tokenizer(models.BPE(byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    core.train_from_iterator([SYSTEM, *(" ".join(turns) for turns in TALKS)] * 3, trainer)
    saved = json.loads(core.to_str())["model"]
    merges = [tuple(merge) for merge in saved["merges"]]
    tokenizer = LlamaTokenizer(vocab=saved["vocab"], merges=merges, legacy=legacy)
    tokenizer.add_tokens(["<image>", "<pad>"], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    tokenizer.add_bos_token = True
    return LlavaProcessor(
        image_processor=tiny_processor().image_processor,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


TALKS = [
    ("What color is the car?\nAnswer with one word.", "Red"),
    ("What is it?", "A cat.", "What is it doing?", "It sleeps: on a mat, quietly."),
    ("Count.", "1, 2", "Who is ASSISTANT?", "Me.", "Naïve? 雪", "Émile said 雪 twice.\nYes. "),
    ("How many?", "4", "And dogs?", "x", "And birds ?", " None", "Why?", "雪 red"),
]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("turns", TALKS)
def test_every_turn_has_the_originals_prompt_and_labels(turns, legacy):
    processor = llama_processor(legacy)
    tokenizer, template = processor.tokenizer, get_template("auto", processor)
    assert template.version == "v1"
    original = Conversation([f"<image>\n{turns[0]}", *turns[1:]]).get_prompt()
    rendered = []
    for at in range(0, len(turns), 2):
        history = tuple(zip(turns[:at:2], turns[1:at:2], strict=True))
        rendered.append(template.render(turns[at], turns[at + 1], history=history))
        asked = Conversation([f"<image>\n{turns[0]}", *turns[1 : at + 1], None]).get_prompt()
        if at == 0:
            asked = Conversation([f"<image>\n{turns[0]}", None]).get_prompt()
        assert template.render(turns[at], history=history).text == asked
        assert original.startswith(rendered[-1].text)
    assert rendered[-1].text == original

    images = [[random_image(0)] for _ in rendered]
    inputs, answer = encode(processor, rendered, images, padding_side="left")
    ids, labelled = original_labels(original, tokenizer, legacy, image_tokens=16)
    covered = [False] * len(ids)
    for row in range(len(rendered)):
        valid = inputs["attention_mask"][row].bool()
        mine = inputs["input_ids"][row][valid].tolist()
        assert mine == ids[: len(mine)]  # token by token, the image expanded
        mask = answer[row][valid].tolist()
        # this turn's labels, and none of the turns before it, which are prompt now
        assert mask == [want and not before for want, before in zip(labelled, covered)][: len(mine)]
        assert mine[mask.index(True) - 1] == tokenizer.convert_tokens_to_ids(":")
        covered = [a or b for a, b in zip(covered, mask + [False] * (len(ids) - len(mask)))]
    assert covered == labelled


def test_a_history_in_a_chat_template():
    processor = tiny_processor()
    template = get_template("chat", processor)
    rendered = template.render(" what color ", "red\n", history=[("is there any", "yes")])
    assert (
        rendered.text == "<s>user <image> is there any assistant yes</s><s>user what color assistant red</s>"
    )
    assert rendered.text[rendered.answer_start :] == " red</s>"
    _, answer = encode(processor, [rendered], [[random_image(0)]], padding_side="right")
    assert answer.sum().item() == 2
    assert answer[0, -2:].all()
    text_only = template.render("what", history=[("is there any", "yes")], has_image=False).text
    assert text_only == "<s>user is there any assistant yes</s><s>user what assistant"

    processor.chat_template = "{{ messages[-1]['content'][-1]['text'] }}"
    with pytest.raises(DataError, match="dropped or changed the history"):
        get_template("chat", processor).render("what", history=[("is there any", "yes")])


@pytest.mark.parametrize("version", ["v1", "chat"])
def test_a_history_that_would_be_misread_is_refused(version):
    template = get_template(version, tiny_processor())
    for question, answer, history, message in [
        ("what", "red", [("a <image>", "b")], "history contains the image placeholder"),
        ("what", "red", [("a", "b</s>")], "history contains the end-of-sequence text"),
        ("what", "red</s>blue", [], "answer contains the end-of-sequence text"),
        ("what", "red", [("a", " ")], "answer is empty"),
    ]:
        with pytest.raises(DataError, match=message):
            template.render(question, answer, history=history)

"""Asks lmms-eval's model ``dyvte`` directly, in the plug-ins' environment.

lmms_checks.py BACKBONE IMAGES EXITS: prints one JSON object with what came out. BACKBONE is the embedded one,
IMAGES a folder of its scenes.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from PIL import Image

from dyvte.errors import DyvteError

COLOR = "What color is the background?"
PLACE = "Where is the cross?"
GREEDY = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": []}


def user(*parts: Any) -> list[dict[str, Any]]:
    """One user turn: texts, images and paths of images."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "url": str(part) if isinstance(part, Path) else part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def reply(text: str) -> dict[str, Any]:
    """What the assistant said."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def ask(model: Any, conversations: list[Any], *generation: dict[str, Any]) -> list[str]:
    """Answers, with the generation arguments of each conversation or those of all."""
    model.task_dict = {"task": {"test": [{"n": n} for n in range(len(conversations))]}}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=(
                COLOR,
                lambda doc: conversations[doc["n"]],
                dict(generation[n % len(generation)]),
                n,
                "task",
                "test",
            ),
            idx=0,
            metadata={"task": "task", "doc_id": n, "repeats": 1},
        )
        for n in range(len(conversations))
    ]
    return [one.text for one in model.generate_until(requests)]


def refused(call: Any) -> str:
    """The message of the error that a call ends with."""
    try:
        call()
    except DyvteError as error:
        return str(error)
    return ""


def snapshot(model: torch.nn.Module) -> dict[Any, Any]:
    """Every attribute of every module, hooks and parameters included."""
    return {
        (name, key): dict(value) if isinstance(value, dict) else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def differing(before: dict[Any, Any], after: dict[Any, Any]) -> list[str]:
    """Attributes that came, went, or are another object."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
        return a is b or (isinstance(a, bool | int | float | str) and a == b)

    return [
        f"{name}.{key}"
        for name, key in sorted(before.keys() | after.keys(), key=repr)
        if not same(before.get((name, key)), after.get((name, key)))
    ]


def main() -> None:
    """Print what came out."""
    backbone, images, exits = sys.argv[1:]
    build = get_model("dyvte").create_from_arg_string
    arguments = f"pretrained={backbone},policy=fixed:6,exits={exits}"
    model = build(arguments, {"batch_size": "3", "device": "cpu", "max_batch_size": None})
    files = sorted(Path(images).iterdir())
    a, b = Image.open(files[0]).convert("RGBA"), files[1]
    conversations = [
        user(a, COLOR),
        user(a, b, COLOR),
        user(PLACE),
        [*user(a, COLOR), reply("red"), *user(PLACE)],
        user(b, COLOR),
        user(b, PLACE),
    ]
    ask(model, conversations, GREEDY)  # transformers itself notes things down in its first call
    before = snapshot(model.model)
    found: dict[str, Any] = {"answers": ask(model, conversations, GREEDY)}
    found["one_by_one"] = [ask(model, [one], GREEDY)[0] for one in conversations]
    found["left_behind"] = differing(before, snapshot(model.model))
    stop = found["answers"][0][1:3]
    found["stopped"] = ask(model, conversations[:1], {**GREEDY, "until": ["\n\n", stop]})[0]
    found["shorter"] = ask(model, conversations, {**GREEDY, "max_new_tokens": 1}, GREEDY)
    found["sampled"] = [
        ask(model, conversations[:1], {"max_new_tokens": 4, "temperature": 5.0})[0] for _ in range(8)
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ask(model, conversations[:1], {**GREEDY, "length_penalty": 2})
    found["warned"] = [str(one.message) for one in caught]
    found["beams"] = refused(lambda: ask(model, conversations[:1], {**GREEDY, "num_beams": 3}))
    system = [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}, *user(a, COLOR)]
    found["system"] = refused(lambda: ask(model, [system], GREEDY))
    found["unknown"] = refused(lambda: build(f"pretrained={backbone},polciy=never", {}))
    found["deep"] = refused(lambda: build(f"pretrained={backbone},policy=fixed:99", {"device": "cpu"}))
    found["batch"] = refused(lambda: build(f"pretrained={backbone}", {"batch_size": "auto"}))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

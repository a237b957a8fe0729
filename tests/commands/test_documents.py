"""What the documents tell people to type is what the programs take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dyvte.cli import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "data/README.md",
    "checkpoints/README.md",
    "benchmarks/README.md",
    "docs/lora.md",
    "docs/runtime.md",
    "docs/training.md",
    "docs/gates.md",
    "docs/budgets.md",
    "docs/analysis.md",
]
# scripts that are thin entry points -> the command whose options they take
ENTRY_POINTS = {
    "scripts/init_weight.py": "init",
    "scripts/finetune_visual_gate.sh": "train",
    "scripts/eval/gqa.sh": "eval",
    "scripts/eval/mme.sh": "eval",
}


def shell_commands(document: str) -> list[list[str]]:
    """Every command of the document's bash blocks, split as a shell would, comments dropped."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_in_the_documents_is_one(document):
    commands = shell_commands(document)
    assert commands or document == "data/README.md"
    for words in commands:
        if words[0] in ("bash", "python") and words[1].startswith("scripts/"):
            assert (ROOT / words[1]).is_file(), words
            name, options = ENTRY_POINTS.get(words[1]), words[2:]
        elif words[0] == "python" and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file(), words
            name = None
        else:
            name, options = (words[1], words[2:]) if words[0] == "dyvte" else (None, [])
        if name is not None:
            assert name in COMMANDS, words
            build_parser(name).parse_args([name, *options])  # SystemExit on an unknown option


def test_readme_links_lead_somewhere():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                assert ((ROOT / document).parent / target).exists(), f"{document}: {target}"


def test_readme_python_runs():
    """The ten lines of use, on the embedded backbone, with the fixed exit in place of trained gates."""
    from PIL import Image

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, *others = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    code = code.replace("checkpoints/tiny-llava", str(ROOT / "checkpoints/tiny-llava"))
    code = re.sub(r"exits = dyvte\.VisualExit\.from_pretrained.*\n# (exits = )", r"\1", code)
    before, block = code.split("with exits(model)")
    space: dict = {}
    exec(before, space)
    processor = space["processor"]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is the star?"}]}
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    picture = Image.new("RGB", (64, 64), "black")
    space["inputs"] = processor(text=[prompt], images=[picture], return_tensors="pt")
    exec("with exits(model)" + block, space)
    # Further blocks are lines that could stand in place of one of the first.
    for other in others:
        exec(other, space)
    run = space["run"]
    assert run.exit_layers.tolist() == [6]
    kept = run.records[-1].kv_bytes
    assert kept[0] == kept[5] > 4 * kept[6] == 4 * kept[9]

"""What documents, comments and help texts tell people to type is what the programs take."""

from __future__ import annotations

import importlib
import re

import pytest

import dyvte
from dyvte.cli import COMMANDS, main
from dyvte.gates import ARCHITECTURES
from dyvte.objectives import OBJECTIVES
from dyvte.policies import POLICIES
from dyvte.reductions import REDUCTIONS
from dyvte.tasks.base import TASKS
from tests.helpers.shown_commands import (
    ROOT,
    commented,
    documents,
    in_blocks,
    in_bodies,
    in_comments,
    in_lines,
    parser_of,
    problem,
    split,
)
from tests.test_imports import ORDER


@pytest.mark.parametrize("document", documents())
def test_every_command_in_a_document_is_one(document):
    wrong = [found for words in in_blocks(document) if (found := problem(words))]
    wrong += [found for words in in_lines(document) if (found := problem(words, whole=False))]
    assert not wrong, "\n".join(wrong)


def test_every_command_in_a_comment_is_one():
    shown = [(file, words) for file in commented() for words in in_comments(file)]
    assert len(shown) > 20
    wrong = [f"{file}: {found}" for file, words in shown if (found := problem(words))]
    assert not wrong, "\n".join(wrong)


def test_every_command_that_a_script_runs_has_its_options():
    shown = [(file, words) for file in commented() if file.endswith(".sh") for words in in_bodies(file)]
    assert {words[1] for _, words in shown} >= {"trace", "calibrate", "search-k", "eval", "compare"}
    wrong = [f"{file}: {found}" for file, words in shown if (found := problem(words, whole=False))]
    assert not wrong, "\n".join(wrong)


def test_the_documents_are_seen():
    assert {"README.md", "docs/training.md", "data/README.md", "checkpoints/README.md"} <= set(documents())
    assert {"configs/embedded_lora.yaml", "scripts/finetune_visual_gate.sh"} <= set(commented())
    assert problem(["dyvte", "eval", "--policy"]) is not None
    assert problem(["dyvte", "evil"]) == "there is no command 'evil'"
    assert problem(["python", "benchmarks/prefill.py", "--heads", "3"]) is not None
    assert problem(["dyvte", "eval", "--polcy", "..."]) == "eval has no --polcy"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_are_shown_as_written_and_are_commands(name, capsys):
    module = importlib.import_module(f"dyvte.commands.{COMMANDS[name][0]}")
    commands = split(module.EXAMPLES)
    assert commands
    assert [found for words in commands if (found := problem(words))] == []
    assert any(words[0] == "dyvte" and words[1] == name for words in commands)
    with pytest.raises(SystemExit):
        parser_of(name).parse_args([name, "--help"])
    shown = capsys.readouterr().out.splitlines()
    for line in module.EXAMPLES.strip().splitlines():
        assert f"  {line}" in shown
    for line in module.__doc__.strip().splitlines():
        assert line in shown, "the description is printed as it is written"
    assert "VALUE" not in "".join(shown).replace("KEY=VALUE", "")


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"dyvte {dyvte.__version__}\n"


# registry -> the document whose table has a row for each of its names
TABLES = [
    (POLICIES, "README.md"),
    (REDUCTIONS, "README.md"),
    (TASKS, "docs/benchmarks.md"),
    (OBJECTIVES, "docs/gates.md"),
    (ARCHITECTURES, "docs/gates.md"),
]


@pytest.mark.parametrize(("registry", "document"), TABLES, ids=lambda one: getattr(one, "kind", one))
def test_every_choice_has_a_row_in_its_table(registry, document):
    rows = [line for line in (ROOT / document).read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    missing = [name for name in registry if not any(re.search(rf"`{name}[`:\[]", row) for row in rows)]
    assert not missing, f"{document} has no row for the {registry.kind} {missing}"


def test_the_houses_table_has_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("## Where a line belongs")[1].split("\n## ")[0]
    named = [name for row in table.splitlines() if row[:1] == "|" for name in re.findall(r"`(\w+)`", row)]
    assert named == [name for name in ORDER if name != "__main__"]


def test_the_files_to_open_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("## Which file to open")[1].split("\n## ")[0]
    changes = [row.split("|")[1:3] for row in table.splitlines() if row.startswith("| a") or "modules" in row]
    assert len(changes) >= 12
    paths = [path for _, cell in changes for path in re.findall(r"`([\w/]+(?:\.py|/))`", cell)]
    folders = [ROOT, ROOT / "dyvte", *(ROOT / "dyvte").glob("*/")]
    lost = [path for path in paths if not any((folder / path).exists() for folder in folders)]
    assert not lost


def test_readme_links_lead_somewhere():
    for document in documents():
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

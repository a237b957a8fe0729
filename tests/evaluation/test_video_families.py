"""Video benchmarks through ``dyvte eval`` on real clips: three families with their own processors.

Needs torchvision and PyAV: ``scripts/test_plugins.sh torchvision`` runs it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dyvte.cli import main
from dyvte.readers.videos import Video, read_frames
from dyvte.tasks.base import get_benchmark
from tests.helpers.benchmark_files import write_benchmark
from tests.helpers.clips import write_clip
from tests.helpers.reference import greedy_reference
from tests.helpers.zoo.llava_like import llava_onevision, video_llava
from tests.helpers.zoo.qwen_like import qwen2_vl
from tests.helpers.zoo.video_processors import VIDEO_PROCESSORS

pytest.importorskip("torchvision", reason="scripts/test_plugins.sh torchvision has it")
pytest.importorskip("av", reason="pip install dyvte[video]")

MODELS = {"video_llava": video_llava, "llava_onevision": llava_onevision, "qwen2_vl": qwen2_vl}
FRAMES, LAYERS, NEW = 4, 4, 3
TOKENS = {"video_llava": FRAMES * 17, "llava_onevision": FRAMES * 4 + 1, "qwen2_vl": FRAMES // 2 * 4}
"""Visual tokens of a clip: per frame 16 patches and a class token; 4 pooled ones, and one newline; per two
frames 16 patches, merged by fours."""
KINDS = {"tgifqa": "zero_shot", "videomme": "parquet", "mvbench": "release"}
POLICIES = ("never", "fixed:1", "freeze:1:3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The three benchmarks with every video as an mp4 file."""
    root = tmp_path_factory.mktemp("data")
    for name, kind in KINDS.items():
        folder = write_benchmark(root / name, name, kind)
        shown = [p for p in folder.rglob("*") if p.suffix == ".gif" or (p.is_dir() and any(p.glob("1.png")))]
        for path in shown:
            frames = read_frames(Video(path), 12)
            images = [np.asarray(frame.resize((16, 16))) for frame in frames]
            longer = [
                image for image in images for _ in range(3)
            ]  # 36 frames at most, so that seconds 1..3 exist
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_clip(path.with_name(f"{path.stem}.mp4"), size=16, images=longer)
        assert shown
    return root


@pytest.fixture(scope="module", params=list(MODELS))
def family(request, tmp_path_factory):
    """Name, folder, model and processor."""
    folder = tmp_path_factory.mktemp(request.param)
    model, _, _ = MODELS[request.param]("sdpa")
    processor = VIDEO_PROCESSORS[request.param]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return request.param, folder, model, processor


@pytest.mark.parametrize("benchmark", list(KINDS))
def test_clips_are_asked_frozen_and_left_behind(family, data, benchmark, tmp_path):
    name, folder, model, processor = family
    policies = [part for text in POLICIES for part in ("--policy", text)]
    code = main(
        [
            *("eval", "--model", str(folder), "--benchmark", benchmark, "--data", str(data / benchmark)),
            *("--output", str(tmp_path), "--num-frames", str(FRAMES), "--frame-sampling", "transformers"),
            *("--max-new-tokens", str(NEW), "--batch-size", "2", "--timing-batches", "0"),
            *("--template", "chat", *policies),
        ]
    )
    assert code == 0
    task = get_benchmark(benchmark)
    questions = task.load(data / benchmark)
    rows = {text: _rows(tmp_path, text) for text in POLICIES}
    for text, answers in rows.items():
        assert len(answers) == len(questions)
        for question, (exits, prediction) in zip(questions, answers, strict=True):
            assert question.video.path.suffix == ".mp4"
            k, f = {"never": (LAYERS, LAYERS), "fixed:1": (1, 1), "freeze:1:3": (3, 1)}[text]
            assert (exits["exit_layer"], exits.get("freeze_layer", k)) == (k, f)
            assert exits["num_visual"] == TOKENS[name]
            expected = _played(model, processor, question, task.prompt(question), k, f)
            assert prediction == expected
    assert (tmp_path / "never" / "scores.json").is_file()


def _rows(folder: Path, text: str) -> list[tuple[dict, str]]:
    run = folder / text.replace(":", "-")
    exits = [json.loads(line) for line in (run / "exits.jsonl").read_text().splitlines()]
    said = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    return [(one, other["prediction"]) for one, other in zip(exits, said, strict=True)]


def _played(model, processor, question, prompt: str, k: int, f: int) -> str:
    """The answer of the stock model with the clip as transformers' own processor prepares it, its visual
    tokens hidden behind layer k and held behind layer f by hooks."""
    clip = read_frames(question.video, FRAMES, "transformers")
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(said, add_generation_prompt=True)
    text = text.replace(processor.image_token, processor.video_token)
    array = np.stack([np.asarray(frame) for frame in clip])
    inputs = processor(text=[text], videos=[array], return_tensors="pt", add_special_tokens=False)
    ids = [processor.tokenizer.convert_tokens_to_ids(processor.video_token)]
    inputs = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    _, tokens = greedy_reference(model, inputs, [k], ids, NEW - 1, freezes_B=[f])
    return processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()

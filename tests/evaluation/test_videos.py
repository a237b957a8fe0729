"""Questions about videos on a tiny Video-LLaVA: the model gets frames as one video, and exits remove them."""

from __future__ import annotations

import pytest
import torch

from dyvte.backbones import BackboneConfig, get_template
from dyvte.evaluation.generation import Pipeline, encode_questions, question_images
from dyvte.evaluation.runner import EvalConfig, run_policies
from dyvte.evaluation.settings import parse_policies
from dyvte.tasks.base import get_benchmark
from tests.helpers.benchmark_files import write_benchmark
from tests.helpers.models import tiny_llava, tiny_processor
from tests.helpers.zoo.common import CLIP, TEXT

FRAMES = 3
PER_FRAME = 17  # 4 x 4 patches and the class token
VIDEO = "<video>"


class VideoProcessor:
    """What the stock one does, without torchvision: pixels of all frames, a placeholder per visual token."""

    image_token, video_token, video_processor, chat_template = "<image>", VIDEO, object(), None

    def __init__(self) -> None:
        self.tokenizer = tiny_processor().tokenizer
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", VIDEO]})

    def __call__(self, text, videos, return_offsets_mapping, return_tensors, **options):
        expanded = [t.replace(VIDEO, VIDEO * (PER_FRAME * len(v))) for t, v in zip(text, videos, strict=True)]
        inputs = self.tokenizer(
            expanded, return_offsets_mapping=return_offsets_mapping, return_tensors=return_tensors, **options
        )
        pixels = [[torch.tensor(list(f.tobytes())).view(16, 16, 3) for f in frames] for frames in videos]
        inputs["pixel_values_videos"] = (
            torch.stack([torch.stack(frames) for frames in pixels]).permute(0, 1, 4, 2, 3) / 255
        )
        return inputs


@pytest.fixture(scope="module")
def pipeline():
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    processor = VideoProcessor()
    ids = processor.tokenizer.convert_tokens_to_ids(["<image>", VIDEO])
    config = VideoLlavaConfig(
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(processor.tokenizer)},
        vision_config={"model_type": "clip_vision_model", **CLIP},
        image_token_id=ids[0],
        video_token_id=ids[1],
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VideoLlavaForConditionalGeneration(config).eval().requires_grad_(False)
    model.generation_config.suppress_tokens = ids
    return Pipeline(model, processor, get_template("v1", processor), max_new_tokens=3, num_frames=FRAMES)


@pytest.fixture
def questions(tmp_path):
    return get_benchmark("tgifqa").load(write_benchmark(tmp_path / "data", "tgifqa", "zero_shot"))


def test_videos_are_asked_and_left_behind(pipeline, questions, tmp_path):
    config = EvalConfig(
        model=BackboneConfig(path="tiny"),
        benchmark="tgifqa",
        data=tmp_path / "data",
        output=tmp_path / "out",
        batch_size=2,
        max_new_tokens=3,
        timing_batches=0,
        num_frames=FRAMES,
    )
    benchmark = get_benchmark("tgifqa")
    results = run_policies(pipeline, benchmark, questions, parse_policies(["never", "fixed:1"]), config)
    never, fixed = results
    layers = pipeline.model.config.text_config.num_hidden_layers
    assert {a.num_visual for result in results for a in result.answers} == {FRAMES * PER_FRAME}
    assert {a.exit_layer for a in never.answers} == {layers}
    assert {a.exit_layer for a in fixed.answers} == {1}
    assert fixed.scores.cost.visual_compute == pytest.approx(1 / layers)
    for question, answer in zip(questions, never.answers, strict=True):
        one = encode_questions(pipeline, [question], [benchmark.prompt(question)])
        tokens = pipeline.model.generate(**one.inputs, max_new_tokens=3, do_sample=False)
        new = tokens[0, one.inputs["input_ids"].shape[1] :]
        assert answer.prediction == pipeline.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert (never.folder / "tgifqa_results.jsonl").is_file()


def test_the_prompt_holds_one_video_and_the_sampled_frames(pipeline, questions):
    batch = encode_questions(pipeline, questions, [q.text for q in questions])
    ids = pipeline.processor.tokenizer.convert_tokens_to_ids([VIDEO])[0]
    assert (batch.inputs["input_ids"] == ids).sum(1).tolist() == [FRAMES * PER_FRAME] * 2
    assert batch.inputs["pixel_values_videos"].shape == (2, FRAMES, 3, 16, 16)
    first = torch.tensor(list(question_images(questions[0], FRAMES)[0].tobytes())).view(16, 16, 3)
    torch.testing.assert_close(batch.inputs["pixel_values_videos"][0, 0], first.permute(2, 0, 1) / 255)


def test_a_processor_without_videos_gets_images(questions):
    model, processor = tiny_llava(2)
    pipeline = Pipeline(model, processor, get_template("chat", processor), num_frames=FRAMES)
    batch = encode_questions(pipeline, questions, [q.text for q in questions])
    assert batch.inputs["pixel_values"].shape[0] == 2 * FRAMES

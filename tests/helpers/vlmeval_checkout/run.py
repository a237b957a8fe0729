"""run.py --config FILE --work-dir DIR; a data set's "file" holds its rows."""

import argparse
import json
from pathlib import Path

import vlmeval.vlm
from vlmeval.config import supported_VLM
from vlmeval.inference import infer_data_job


class Dataset:
    """Rows {"index", "question", "images"}."""

    def __init__(self, name, file):
        self.dataset_name = name
        self.data = json.loads(Path(file).read_text())

    def dump_image(self, line):
        """Files of a row's images."""
        return line["images"]

    def build_prompt(self, line):
        """Images, then the question."""
        shown = [{"type": "image", "value": path} for path in self.dump_image(line)]
        return [*shown, {"type": "text", "value": line["question"]}]


def build_model(name, config, use_vllm):
    """As a class with arguments, or by name alone."""
    config = dict(config)
    if use_vllm:
        config["use_vllm"] = use_vllm
    if "class" not in config:
        return supported_VLM[name](**config)
    class_name = config.pop("class")
    if not hasattr(vlmeval.vlm, class_name):
        raise ValueError(f"Class {class_name} is not supported in `vlmeval.api` or `vlmeval.vlm`")
    return getattr(vlmeval.vlm, class_name)(**config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--work-dir")
    parser.add_argument("--use-vllm", action="store_true")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    config = json.loads(Path(args.config).read_text())
    for model_name, settings in config["model"].items():
        model = build_model(model_name, settings, args.use_vllm)
        for data_name, data in config["data"].items():
            dataset = Dataset(data_name, data["file"])
            model = infer_data_job(
                model, args.work_dir, model_name, dataset, use_vllm=args.use_vllm, limit=args.limit
            )

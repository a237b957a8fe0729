"""The loop over a data set."""

import json
from pathlib import Path

from vlmeval.config import supported_VLM


def infer_data_job(model, work_dir, model_name, dataset, use_vllm=False, limit=None):
    """Ask what has no answer yet, one question at a time; the model may be a name."""
    path = Path(work_dir) / f"{model_name}_{dataset.dataset_name}.json"
    answers = json.loads(path.read_text()) if path.is_file() else {}
    kwargs = {"use_vllm": use_vllm} if "Llama-4" in model_name or "Qwen2-VL" in model_name else {}
    model = supported_VLM[model_name](**kwargs) if isinstance(model, str) else model
    assert not getattr(model, "is_api", False)
    model.set_dump_image(dataset.dump_image)
    for line in dataset.data[:limit]:
        if str(line["index"]) in answers:
            continue
        if model.use_custom_prompt(dataset.dataset_name):
            message = model.build_prompt(line, dataset=dataset.dataset_name)
        else:
            message = dataset.build_prompt(line)
        answers[str(line["index"])] = model.generate(message=message, dataset=dataset.dataset_name)
    path.write_text(json.dumps(answers))
    return model

"""The loop over a data set."""

import json
from pathlib import Path

from vlmeval.config import supported_VLM


def infer_data_job(model, work_dir, model_name, dataset):
    """Ask everything, one question at a time; the model may be a name."""
    model = supported_VLM[model_name]() if isinstance(model, str) else model
    assert not getattr(model, "is_api", False)
    model.set_dump_image(dataset.dump_image)
    answers = {}
    for line in dataset.data:
        assert not model.use_custom_prompt(dataset.dataset_name)
        message = dataset.build_prompt(line)
        answers[line["index"]] = model.generate(message=message, dataset=dataset.dataset_name)
    path = Path(work_dir) / f"{model_name}_{dataset.dataset_name}.json"
    path.write_text(json.dumps(answers))
    return model

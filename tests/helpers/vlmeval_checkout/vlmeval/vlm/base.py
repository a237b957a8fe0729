"""What a model class derives from."""

from abc import abstractmethod
from pathlib import Path


class BaseModel:
    """Checks a message before `generate_inner` sees it."""

    INTERLEAVE = False
    allowed_types = ["text", "image"]  # noqa: RUF012 as it is there

    def __init__(self):
        self.dump_image_func = None

    def use_custom_prompt(self, dataset):
        """Whether `build_prompt` of the model is to be used."""
        return False

    def set_dump_image(self, dump_image_func):
        """Called before the first question."""
        self.dump_image_func = dump_image_func

    @abstractmethod
    def generate_inner(self, message, dataset=None):
        """The model's own part."""
        raise NotImplementedError

    def generate(self, message, dataset=None):
        """A list of {"type", "value"}; a text's value must be no file, an image's must be one."""
        assert isinstance(message, list)
        for item in message:
            assert set(item) >= {"type", "value"}
            assert item["type"] in self.allowed_types, f"Invalid input type: {message}"
            assert (item["type"] == "text") != Path(item["value"]).is_file()
        return self.generate_inner(message, dataset)

"""Data: LLaVA conversations from files, datasets and the hub; the synthetic scenes."""

from dyvte.data.config import DataConfig, select_samples
from dyvte.data.defects import Defect, check_defects, log_excluded
from dyvte.data.images import load_image
from dyvte.data.llava import Conversations
from dyvte.data.samples import EmbeddedImage, Sample
from dyvte.data.selection import Selection, select, selection_sha256
from dyvte.data.sources import open_conversations, open_hub_conversations

__all__ = [
    "Conversations",
    "DataConfig",
    "Defect",
    "EmbeddedImage",
    "Sample",
    "Selection",
    "check_defects",
    "load_image",
    "log_excluded",
    "open_conversations",
    "open_hub_conversations",
    "select",
    "select_samples",
    "selection_sha256",
]

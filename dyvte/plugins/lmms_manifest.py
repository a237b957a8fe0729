"""Entry point of the lmms-eval model ``dyvte``. Read whenever lmms-eval starts: it imports nothing heavy."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="dyvte", chat_class_path="dyvte.plugins.lmms_model.DyvteChat")

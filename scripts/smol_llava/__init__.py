"""How the embedded 30-layer backbone is trained: packed questions, a lean LoRA decoder, kept language."""

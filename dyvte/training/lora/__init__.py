"""A LoRA adapter for earlier exits."""

"""Models by name: callables that build them."""

supported_VLM = {}

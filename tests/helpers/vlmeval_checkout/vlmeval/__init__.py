"""A stand-in for a checkout of VLMEvalKit, for tests without its environment.

It has the interface that ``dyvte.plugins.vlmevalkit`` meets (`vlm.base.BaseModel`, `config.supported_VLM`,
`inference.infer_data_job`, the model part of ``run.py``) with its checks and the order of its calls, and
nothing else.
"""

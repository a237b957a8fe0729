"""Visual tokens that freeze and leave inside vLLM, by plug-in (``docs/vllm.md``).

Nothing of vLLM is copied or changed. vLLM calls `register` in each of its processes; an engine takes part
when its user names one of our architectures in ``--hf-overrides`` and a policy in ``--additional-config``.
"""

from __future__ import annotations

from dyvte.plugins.vllm.registration import engine_arguments, register

__all__ = ["engine_arguments", "register"]

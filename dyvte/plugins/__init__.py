"""Plug-ins for other evaluation harnesses; the only place that imports them (``docs/plugins.md``)."""

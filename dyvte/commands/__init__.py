"""Subcommands of ``dyvte``, one module each.

A module's docstring is the description in ``--help``; it has ``EXAMPLES``, commands that are shown below the
options as they are written, ``add_arguments(parser)`` and ``run(args) -> int``, the exit code.
"""

"""From a command line to a configuration."""

from __future__ import annotations

import argparse
from typing import TypeVar

Config = TypeVar("Config")


def config_from(cls: type[Config], args: argparse.Namespace) -> Config:
    """A configuration from ``--config``, then the options that were given, then ``--set``."""
    import dataclasses

    import yaml

    from dyvte.config import load_config

    given = vars(args)
    names = [f.name for f in dataclasses.fields(cls) if given.get(f.name) is not None]  # type: ignore[arg-type]
    overrides = [f"{name}={yaml.safe_dump(given[name], default_flow_style=True)}" for name in names]
    return load_config(cls, args.config, [*overrides, *args.set])

"""What all tests share: the folder a module works on, and the table of the slowest tests."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLOWEST = 20


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the module's ``WORLD`` says (see `tests.helpers.world.World`)."""
    return request.module.WORLD.write(tmp_path_factory.mktemp("world"))


# --- the slowest tests ---


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--slowest FILE``: write the table there."""
    parser.addoption("--slowest", metavar="FILE", help="write a table of the slowest tests")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Write the table of the slowest tests, and say where."""
    path = config.getoption("--slowest")
    if not path:
        return
    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "nodeid") and hasattr(report, "duration"):
                seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
    text = slowest_table(seconds, SLOWEST)
    Path(path).write_text(text, encoding="utf-8")
    terminalreporter.write_line(f"{sum(seconds.values()):.0f} s in {len(seconds)} tests; slowest: {path}")


def slowest_table(seconds: dict[str, float], count: int) -> str:
    """Markdown: the tests that take longest, set-up and tear-down included, with their share of the whole."""
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])[:count]
    shown = sum(value for _, value in ordered)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines = [
        "# The slowest tests",
        "",
        "Written by `scripts/test.sh --slowest tests/SLOWEST.md`. "
        f"{len(seconds)} tests took {total:.0f} s on {machine}; these {len(ordered)} took {shown:.0f} s.",
        "",
        "| seconds | share | test |",
        "|---|---|---|",
        *(f"| {value:.1f} | {value / total:.1%} | `{name}` |" for name, value in ordered),
    ]
    return "\n".join(lines) + "\n"

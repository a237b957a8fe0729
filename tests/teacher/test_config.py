"""Which exits and freeze layers a teacher's settings mean."""

from __future__ import annotations

import pytest

from dyvte.errors import ConfigError
from dyvte.teacher import TeacherConfig


def test_listed_exits_and_the_full_model_are_labelled():
    assert TeacherConfig(exit_layers=(5, 2)).schedules(6).exits == (2, 5, 6)
    assert TeacherConfig(exit_layers=(0, 6)).schedules(6).exits == (0, 6)
    assert TeacherConfig().schedules(3).exits == (0, 1, 2, 3)
    assert TeacherConfig(exit_every=2).schedules(5).exits == (0, 2, 4, 5)
    found = TeacherConfig(exit_layers=(3, 4), freeze_layers=(1,)).schedules(5)
    assert (found.exits, found.freezes) == ((3, 4, 5), (1,))


def test_exits_that_are_not_there_or_said_twice_are_refused():
    with pytest.raises(ConfigError, match=r"\[7\] do not lie in 0\.\.6"):
        TeacherConfig(exit_layers=(2, 7)).schedules(6)
    with pytest.raises(ConfigError, match="not by both"):
        TeacherConfig(exit_layers=(2,), exit_every=2)

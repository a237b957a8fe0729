"""docs/support.md says what the code says."""

import pytest
import transformers

from dyvte.errors import UnsupportedBackboneError
from tests.helpers import support

TABLE = support.parse(support.FILE.read_text())
VERSION_LINE = f"transformers {transformers.__version__}, judged"

pytestmark = pytest.mark.skipif(
    VERSION_LINE not in support.FILE.read_text(),
    reason="the table was written with another transformers: run `python -m tests.helpers.support`",
)


def test_the_table_holds_every_class_once():
    assert [(row.family, row.model_class) for row in TABLE.values()] == list(support.families())


def test_the_table_agrees_with_what_configs_say():
    for family, row in TABLE.items():
        decoder, verdict, reason = support.judge(family)
        assert row.decoder == decoder, family
        if verdict == "served":
            assert row.status in ("exact", "not tried"), row
            assert row.frozen in (("exact", "refused") if row.status == "exact" else ("-",)), row
        else:
            assert (row.status, row.detail) == (verdict, reason)


def test_every_family_with_a_test_of_its_own_is_exact():
    for family in support.FAMILIES.keys() & TABLE.keys():
        row = TABLE[family]
        assert (row.status, row.frozen, row.detail) == ("exact", "exact", "with a random vision tower")


@pytest.mark.full
@pytest.mark.parametrize("family", [row.family for row in TABLE.values() if row.status == "exact"])
def test_what_is_called_exact_is_exact(family):
    assert support.try_family(family, TABLE[family].model_class) == TABLE[family]


@pytest.mark.parametrize("family", ["qwen3_5", "lfm3_vl"])
def test_entering_a_block_refuses_too(family):
    # the model, not only its config; nothing is left on it
    model = support.generic.tiny(
        getattr(transformers, TABLE[family].model_class), support.default_config(family)
    )
    with pytest.raises(UnsupportedBackboneError, match="recurrent"), support.dyvte.VisualExit.fixed(1)(model):
        pass
    assert not any("forward" in vars(module) for module in model.modules())

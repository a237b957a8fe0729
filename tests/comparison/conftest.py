"""What comparisons in tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_routers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Routers that train for as few steps as a module's ``ROUTER_STEPS`` says; else as they always do."""
    steps = getattr(request.module, "ROUTER_STEPS", None)
    with pytest.MonkeyPatch.context() as patch:
        if steps is not None:
            patch.setattr("dyvte.comparison.tuned_router.ROUTER_MIN_STEPS", steps)
        yield

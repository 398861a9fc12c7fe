"""Order of the tests: what needs the same servers runs together. What a process has one of: an engine, a reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from sgl_flowprefill.model import embedded_model_path

if TYPE_CHECKING:  # they import torch, which most unit tests do without
    from tests.engine import PrefillEngine
    from tests.reference import Comparison, Reference

# Generated examples say nothing about time: a busy machine is no failure.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

ORDER = ("flowprefill_cluster", "stock_cluster", "no_cluster")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        return next((i for i, name in enumerate(ORDER, start=1) if name in names), 0)

    items.sort(key=place)


@pytest.fixture(scope="session")
def shared_engine() -> PrefillEngine:
    """One scheduler, which serves the embedded model."""
    from tests.engine import PrefillEngine

    return PrefillEngine(str(embedded_model_path()))


@pytest.fixture
def engine(shared_engine: PrefillEngine) -> Iterator[PrefillEngine]:
    """The shared engine, as it was when it was made."""
    from tests.chaos import calm

    hub = shared_engine.scheduler.hub
    limits, device = hub.work.policy.limits, hub.device
    shared_engine.answers.clear()
    shared_engine.batch_sizes.clear()
    yield shared_engine
    calm(shared_engine)
    hub.work.policy.limits = limits
    shared_engine.use(device)


@pytest.fixture(scope="session")
def reference() -> Reference:
    """The embedded model in transformers; what it has computed for one test, the others have."""
    from tests.reference import Reference

    return Reference(embedded_model_path())


@pytest.fixture
def comparison(reference: Reference) -> Iterator[Comparison]:
    """Compares with the embedded model, and prints at the end what was compared."""
    from tests.reference import Comparison

    comparison = Comparison(reference)
    yield comparison
    print(f"\n{comparison}")

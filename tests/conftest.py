"""Order of the tests: what needs the same servers runs together."""

from __future__ import annotations

import pytest

ORDER = ("flowprefill_cluster", "stock_cluster", "no_cluster")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        return next((i for i, name in enumerate(ORDER, start=1) if name in names), 0)

    items.sort(key=place)

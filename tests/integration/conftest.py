"""The model of tests with two ranks, computed by transformers."""

from __future__ import annotations

import pytest

from sgl_flowprefill.model import EmbeddedModel, embedded_model_path
from tests.reference import Reference

TWO_HEADS = EmbeddedModel(heads=2, layers=4, context_tokens=4608)
"""Two query heads, one a rank, which share the one KV head: each rank keeps a copy of it."""


@pytest.fixture(scope="session")
def two_heads() -> Reference:
    """TWO_HEADS in transformers; what it has computed for one test, the others have."""
    return Reference(embedded_model_path(TWO_HEADS))

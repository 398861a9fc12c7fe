"""The models of tests with two ranks, computed by transformers, and the prompts that they are asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_flowprefill.model import EmbeddedModel, embedded_model_path
from tests.data_parallel_ranks import qwen3
from tests.prompts import prompt
from tests.reference import Reference

TWO_HEADS = EmbeddedModel(heads=2, layers=4, context_tokens=4608)
"""Two query heads, one a rank, which share the one KV head: each rank keeps a copy of it."""
OWN_HEADS = EmbeddedModel(heads=4, kv_heads=2, layers=4, context_tokens=4608)
"""Two KV heads, one a rank, each with two query heads: what the ranks have of the KV cache is not the same."""
JOINT = EmbeddedModel(heads=2, layers=8, context_tokens=4608)
"""What ranks with data-parallel attention serve as a Qwen3."""
LENGTHS = (40, 500, 1900, 350, 1300, 310, 7, 2500, 900, 330, 64, 1700)
"""Tokens of the prompts that all pairs of ranks are asked: who has a model's references for one test, has them for all.
"""
SHARED = prompt(99, 300)
PROMPTS = {f"r{i:02}": prompt(i, tokens, SHARED if i % 2 else None) for i, tokens in enumerate(LENGTHS)}


@pytest.fixture(scope="session")
def two_heads() -> Reference:
    """TWO_HEADS in transformers; what it has computed for one test, the others have."""
    return Reference(embedded_model_path(TWO_HEADS))


@pytest.fixture(scope="session")
def own_heads() -> Reference:
    """OWN_HEADS in transformers; what it has computed for one test, the others have."""
    return Reference(embedded_model_path(OWN_HEADS))


@pytest.fixture(scope="session")
def joint_path() -> Path:
    return qwen3(JOINT)


@pytest.fixture(scope="session")
def joint(joint_path: Path) -> Reference:
    """JOINT in transformers; what it has computed for one test, the others have."""
    return Reference(joint_path)

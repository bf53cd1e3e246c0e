"""One verifier, one sandbox and one math pool for all tests of this folder: real ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rewards.math import MathPool
from rewards.registry import Verifier
from rewards.sandbox import Limits, Sandbox


@pytest.fixture(scope="session")
def pool() -> Iterator[MathPool]:
    with MathPool(size=1, cpu_seconds=1.5) as pool:
        yield pool


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    return Sandbox(Limits(cpu_seconds=1, wall_seconds=30))


@pytest.fixture(scope="session")
def verifier() -> Iterator[Verifier]:
    with Verifier(limits=Limits(cpu_seconds=1, wall_seconds=30)) as verifier:
        yield verifier

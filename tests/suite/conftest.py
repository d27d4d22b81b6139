"""What the tests of the benchmarks share."""

import pytest


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals also of a handful of units, as tables worked out by hand have."""
    monkeypatch.setattr("agevlm_mlx.evaluation.benchmark.FEWEST", 1)

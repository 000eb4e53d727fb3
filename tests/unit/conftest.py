from __future__ import annotations

from collections.abc import Iterator

import pytest

from bitwright import native

from .backends import VARIANTS, restore, use


@pytest.fixture(params=[*VARIANTS, native.REFERENCE])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The test runs once on every backend."""
    use(request.param, monkeypatch)
    yield request.param
    restore()

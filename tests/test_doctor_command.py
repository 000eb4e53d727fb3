"""`bitwright doctor`: what was found and chosen, each kernel tested, and a wrong one named."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import support
from bitwright import native
from bitwright.runtime import ops, schemas

needs_native = pytest.mark.skipif(native.find() is None, reason="built without native kernels")


@needs_native
def test_it_says_what_runs_and_that_it_is_right() -> None:
    outcome = support.run_cli("doctor")
    assert outcome.code == 0
    module: Any = native.find()
    assert f"{module.chosen():<16} chosen" in outcome.out
    for name, runs in module.variants():
        if runs and name != "scalar":
            assert f"site_linear, 101 tokens  {name:<16} equal to the scalar twin" in outcome.out
    report = json.loads(support.run_cli("doctor", "--json").out)
    tested = {check["op"].split(",")[0] for check in report["checks"]}
    # What is the same code in every variant has no twin to be held against.
    assert set(schemas.NAMES) - tested == {"dequantize", "site_hadamard"}
    assert report["ok"] is True
    assert report["chosen"] == module.chosen()
    assert {check["variant"] for check in report["checks"]} == {n for n, r in module.variants() if r and n != "scalar"}


@needs_native
def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.site_linear
    module: Any = native.find()

    def wrong(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        y: torch.Tensor = right(x, *rest)
        return y if module.chosen() == "scalar" else y + (y == y.max()) * 0.01 * y

    monkeypatch.setattr(ops, "site_linear", wrong)
    outcome = support.run_cli("doctor")
    assert outcome.code == 1
    assert "WRONG" in outcome.out


def test_without_kernels_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitwright.runtime.selftest as selftest

    monkeypatch.setenv(native.VARIABLE, native.REFERENCE)
    monkeypatch.setattr(selftest, "find", lambda: None)
    native.native.cache_clear()
    try:
        outcome = support.run_cli("doctor")
        assert outcome.code == 0
        assert "reference        chosen" in outcome.out
        assert "installed without its native kernels" in outcome.out
    finally:
        native.native.cache_clear()

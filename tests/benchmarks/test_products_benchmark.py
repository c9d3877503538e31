"""products.py: its table in a small size, and that libraries which disagree are noticed."""

import argparse
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def test_each_product_of_a_layer_is_measured_with_both(benchmark: Callable[..., list[str]]) -> None:
    lines = benchmark("products.py", "--smoke")
    rows = [line.split("  ")[:2] for line in lines[1:-2]]
    assert rows[:3] == [["x W^T", "24 x 96 x 96"], ["dy W", "24 x 96 x 96"], ["dy^T x", "96 x 24 x 96"]]
    assert rows[-2:] == [["logits", "24 x 96 x 18"], ["dlogits W", "24 x 18 x 96"]] and len(rows) == 3 * 3 + 2
    assert all(line.endswith("MKL") for line in lines[1:-2])  # far too small for gft train to take oneDNN's


def test_another_result_ends_the_run(module: Callable[[str], ModuleType]) -> None:
    products = module("products")
    right = products.product("x W^T", torch.randn(5, 4), torch.randn(6, 4))
    products.check_same(right)
    wrong = argparse.Namespace(name="x", mkl=right.mkl, onednn=lambda: right.mkl() * 1.001)
    with pytest.raises(SystemExit, match="the two libraries differ by"):
        products.check_same(wrong)

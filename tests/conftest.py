"""What every test shares: one thread, and the `gpu` marker's meaning.

Where bench/gpu.sh runs the tests no GPU test is skipped for want of a device or of the kernels.
"""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(1)  # the matrices of the tests are small, and one thread sums in one order


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or "SYMTELE_KERNELS_REQUIRED" in os.environ:
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)

"""What every test file shares: the real data's folder, few threads, fixed seeds."""

from __future__ import annotations

import os
import random
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; workers of xdist share the cores
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")

import numpy as np
import pytest


@pytest.fixture(scope="session")
def testdata() -> Path:
    """The folder of real images that PRETRAIN3D_TESTDATA names; the test is skipped without one."""
    folder = os.environ.get("PRETRAIN3D_TESTDATA")
    if not folder:
        pytest.skip("PRETRAIN3D_TESTDATA names no folder of real data")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"PRETRAIN3D_TESTDATA={folder} is no folder")
    return path


@pytest.fixture(autouse=True)
def _seeds() -> None:
    import torch

    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 the legacy state is what other libraries draw from
    torch.manual_seed(0)

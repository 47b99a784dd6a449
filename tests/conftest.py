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


@pytest.fixture(scope="session")
def phantom_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small embedded set as NIfTI files: 6 training, 2 test and 3 unlabelled cases."""
    from pretrain3d.__main__ import main

    folder = tmp_path_factory.mktemp("phantom") / "raw"
    assert main(["phantom", f"out={folder}", "train=6", "test=2", "unlabelled=3", "workers=1"]) == 0
    return folder


@pytest.fixture(scope="session")
def phantom_store(phantom_raw: Path) -> Path:
    """`phantom_raw` as a store of 4 mm voxels: small volumes, the same code."""
    from pretrain3d.__main__ import main

    folder = phantom_raw.parent / "store"
    line = ["prepare", str(phantom_raw), f"out={folder}", "reader=nndetection", "spacing_mm=4", "workers=1"]
    assert main(line) == 0
    return folder

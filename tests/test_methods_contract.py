"""The contract of `objectives.contract`, for every registered method that is trained without labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_checks import generators, make, make_batch
from torch import nn

from pretrain3d.objectives import PRETRAINING
from pretrain3d.objectives.contract import Method, ViewMethod
from pretrain3d.registry import check_promises, takes

SHAPE = (24, 24, 16)
METHODS = [name for name in PRETRAINING if not takes(PRETRAINING, {"name": name}, "module.method", "make_stem")]


@pytest.mark.parametrize("name", METHODS)
def test_what_it_promises_it_does(name: str) -> None:
    backbone, method = make(name, SHAPE)
    views = hasattr(method, "after_step")
    check_promises(method, ViewMethod if views else Method, "method")
    batch = make_batch(SHAPE)
    prepared, again = (method.prepare(batch, generators(5, 6)) for _ in range(2))
    assert all(torch.equal(value, again[key]) for key, value in prepared.items() if isinstance(value, torch.Tensor))
    other = method.prepare(batch, generators(7, 8))
    assert any(not torch.equal(prepared[key], other[key]) for key in ("inputs", "keep") if key in prepared)
    if views:
        assert prepared["inputs"].shape[2:] == (1, *method.view_size)
    else:
        assert {"inputs", "targets", "keep"} <= prepared.keys() and prepared["keep"].dtype == torch.bool
    with torch.autocast("cpu", torch.bfloat16):
        outputs = method(backbone, prepared)
    losses = method.loss(outputs, prepared)
    assert all(v.dtype == torch.float32 and v.shape == () and v.isfinite() for v in losses.values()), losses
    assert {key for key, value in losses.items() if value.requires_grad} >= {"loss"}
    losses["loss"].backward()
    for key, parameter in nn.ModuleDict({"backbone": backbone, "method": method}).named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    for picture in method.pictures(outputs, prepared).values():
        assert picture.dtype == np.float32 and picture.ndim == 2 and np.isfinite(picture).all()

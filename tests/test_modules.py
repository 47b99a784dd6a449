"""Averaging, schedules, decay groups and the check of the loss, without a trainer."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
from torch import nn

from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.config import UserError
from pretrain3d.modules.averaging import Average
from pretrain3d.modules.base import BaseModule
from pretrain3d.modules.detection import DetectionModule
from pretrain3d.modules.optim import parameter_groups, warmup_then
from pretrain3d.modules.reconstruction import ReconstructionModule
from pretrain3d.modules.segmentation import SegmentationModule


def test_average_follows_its_definition() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = Average({"net": network}, decay=0.5)
    expected = network[0].weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            network[0].weight += 1.0
            network[1].running_mean += 1.0
        average.update({"net": network})
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network[0].weight.detach()
    torch.testing.assert_close(average.net[0].weight, expected)
    torch.testing.assert_close(average.net[1].running_mean, network[1].running_mean)
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert not average.train().net.training
    restored = Average({"net": network}, decay=0.5)
    restored.load_state_dict(average.state_dict())
    assert int(restored.updates) == 5


def test_schedule_ramps_over_the_warm_up_and_ends_at_zero() -> None:
    factor = warmup_then("poly", warmup_steps=4, max_steps=10)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(7) == pytest.approx(0.5**0.9)
    assert factor(10) == 0.0
    assert warmup_then("cosine", 0, 8)(4) == pytest.approx(0.5)
    assert warmup_then("constant", 0, 8)(7) == 1.0


@pytest.mark.parametrize(
    ("name", "warmup", "message"),
    [("linear", 0, "module.schedule is 'linear'; it is one of cosine"), ("poly", 10, "must be 0 or more and below 10")],
)
def test_schedule_mistakes(name: str, warmup: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        warmup_then(name, warmup, 10)


@pytest.mark.parametrize(("algorithm", "expected"), [(None, [0.6, -0.8]), ("norm", [0.6, -0.8]), ("value", [1, -1])])
def test_gradients_are_clipped_as_asked(algorithm: str | None, expected: list[float]) -> None:
    module = BaseModule(nn.Linear(1, 1), nn.Linear(1, 1), "head", {}, {"name": "sgd", "lr": 1.0})
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, -4.0])
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, gradient_clip_algorithm=algorithm)
    module.configure_gradient_clipping(torch.optim.SGD([weight], 1.0), 1.0, trainer.gradient_clip_algorithm)
    torch.testing.assert_close(weight.grad, torch.tensor(expected, dtype=torch.float32))


def test_norms_and_biases_do_not_decay() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.InstanceNorm3d(2, affine=True))
    decayed, plain = parameter_groups({"net": network}, 0.1)
    assert decayed["weight_decay"] == 0.1 and decayed["params"] == [network[0].weight]
    assert plain["weight_decay"] == 0.0 and len(plain["params"]) == 3  # type: ignore[arg-type]


SIZE = (8, 8, 8)


def reconstruction(seed: int = 0) -> ReconstructionModule:
    backbone = ResEnc([4, 6], [1, 1], [1, 2])
    return ReconstructionModule(backbone, {"name": "mae", "block": 2}, SIZE, {"seed": seed}, {}, ema=0.9)


def a_batch() -> dict[str, Any]:
    inside = torch.ones(2, 1, *SIZE, dtype=torch.bool)
    return {"image": torch.randn(2, 1, *SIZE), "inside": inside, "sample_index": [4, 7], "case_ids": ["a", "b"]}


@pytest.mark.parametrize("kind", ["reconstruction", "segmentation", "detection"])
def test_averaged_weights_validate_and_predict(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        pytest.fail("the weights that are trained were used")

    backbone = ResEnc([4, 6], [1, 1], [1, 2])
    module: Any
    if kind == "reconstruction":
        module = reconstruction()
        monkeypatch.setattr(module, "finish_losses", lambda *_: None)
        predict = lambda: module.validation_step(a_batch(), 1)  # noqa: E731
    elif kind == "segmentation":
        module = SegmentationModule(backbone, {"name": "supervised"}, {"ct": ["liver"]}, SIZE, {}, {}, ema=0.9)
        predict = lambda: module.predict_logits(torch.zeros(1, *SIZE), 0)  # noqa: E731
    else:
        detector = {"name": "retinanet", "anchors": {"boxes": [[4, 4, 4]]}, "fpn_channels": 8, "num_convs": 0}
        module = DetectionModule(backbone, detector, ["nodule"], {}, SIZE, {}, {}, ema=0.9)
        predict = lambda: module.predict_views(torch.zeros(1, *SIZE))  # noqa: E731
    module.eval()
    seen: list[object] = []
    for name, network in module.networks.items():
        network.register_forward_pre_hook(forbidden)
        module.averaged.get_submodule(name).register_forward_pre_hook(lambda *_: seen.append(1))
    predict()
    assert len(seen) == 2


def test_masks_of_validation_are_the_same_whatever_the_seed() -> None:
    batch = a_batch()
    for stage, equal in (("val", True), ("train", False)):
        one, other = (module.prepare(module.method, batch, stage)["keep"] for module in map(reconstruction, (1, 2)))
        assert torch.equal(one, other) == equal

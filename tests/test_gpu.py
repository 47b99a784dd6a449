"""What only a GPU can show: no step waits for it, bf16 and `torch.compile` train there, it computes what a CPU does."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods_learn import RUNS

from pretrain3d.__main__ import main
from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.detection.retina import RetinaUNet
from pretrain3d.modules.base import BaseModule
from pretrain3d.reporting.cost import cost_of
from pretrain3d.reporting.run_folder import RunFolder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS, WARM = 8, 4


def fit(config: str, store: Path, out: Path, *more: str) -> list[float]:
    """The training losses of a short run on the GPU, through the command."""
    assert main([
        "fit", "--config", f"configs/{config}.yaml", "name=run", f"out={out}", f"data.store={store}",
        "data.batch_size=2", "data.num_workers=0", "module.warmup_steps=1", f"trainer.max_steps={STEPS}",
        f"trainer.val_every_n_steps={STEPS}", f"trainer.checkpoint_every_n_steps={STEPS}", "trainer.accelerator=gpu",
        "trainer.precision=bf16-mixed", *more,
    ]) == 0  # fmt: skip
    with open(out / "run" / "metrics.csv", newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """CUDA's sync debug mode is on in forward, losses, backward and optimiser of all but the first steps."""
    real, watched = BaseModule.optimizer_step, []

    def strict(self: BaseModule, *args: Any, **kwargs: Any) -> None:
        watch = self.global_step >= WARM
        torch.cuda.set_sync_debug_mode("error" if watch else "default")
        try:
            real(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        watched.extend([self.global_step] if watch else [])

    monkeypatch.setattr(BaseModule, "optimizer_step", strict)
    return watched


@pytest.mark.parametrize("config", RUNS)
def test_no_step_of_a_pretraining_waits(config: str, phantom_store: Path, tmp_path: Path, no_waiting: list) -> None:
    more = [setting for setting in RUNS[config].settings if not setting.startswith("data.batch_size")]
    more += ["data.pool=all", f"trainer.log_every_n_steps={STEPS + 1}"]
    fit(f"pretrain/phantom_{config}", phantom_store, tmp_path, *more)
    assert len(no_waiting) == STEPS - WARM


def test_no_step_of_retina_unet_waits(phantom_store: Path, tmp_path: Path, no_waiting: list) -> None:
    fit("detect/phantom", phantom_store, tmp_path, f"trainer.log_every_n_steps={STEPS + 1}")
    assert len(no_waiting) == STEPS - WARM


@pytest.mark.parametrize("config", ["detect/phantom", "detect/phantom_detr", "pretrain/phantom_mae"])
def test_bf16_trains(config: str, phantom_store: Path, tmp_path: Path) -> None:
    losses = fit(config, phantom_store, tmp_path, "trainer.log_every_n_steps=1")
    assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses)
    cost = cost_of(RunFolder(tmp_path / "run"))
    assert cost["memory_gib"] > 0 and cost["samples_per_second"] > 0 and cost["tflop_per_sample"] > 0
    assert cost["device"] == torch.cuda.get_device_name()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["detect/phantom", "pretrain/phantom_mae"])
def test_compiled_networks_train(config: str, phantom_store: Path, tmp_path: Path) -> None:
    eager = fit(config, phantom_store, tmp_path / "eager", "trainer.log_every_n_steps=1")
    compiled = fit(config, phantom_store, tmp_path / "compiled", "trainer.log_every_n_steps=1", "trainer.compile=true")
    assert compiled == pytest.approx(eager, rel=0.05)  # bf16


def test_losses_and_gradients_are_those_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    results = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        backbone = ResEnc([8, 16, 32], [1, 1, 1], [1, 2, 2])
        detector = RetinaUNet(backbone.levels, 2, {"boxes": [[6, 6, 6], [10, 10, 10]]}, [1, 2], fpn_channels=16)
        networks = torch.nn.ModuleDict({"backbone": backbone, "detector": detector}).to(device)
        image = torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
        boxes = torch.tensor([[[4.0, 5, 6, 11, 12, 13]], [[15.0, 15, 15, 24, 26, 25]]], device=device)
        mask = torch.zeros(2, 32, 32, 32, dtype=torch.long, device=device)
        batch = {"image": image, "boxes": boxes, "labels": torch.tensor([[0], [1]], device=device), "mask": mask,
                 "valid": torch.ones(2, 1, dtype=torch.bool, device=device),
                 "annotated": torch.ones(2, 2, dtype=torch.bool, device=device)}  # fmt: skip
        loss = detector.loss(detector(backbone(image), image.shape[2:]), batch)["loss"]
        loss.backward()
        results[device] = float(loss), [parameter.grad.cpu() for parameter in networks.parameters()]
    assert results["cuda"][0] == pytest.approx(results["cpu"][0], rel=1e-4)
    for ours, reference in zip(results["cuda"][1], results["cpu"][1], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-2, atol=1e-4)

"""Training as a GPU would see it: nothing waits for the device, nothing mixes host and device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_methods_learn import RUNS
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs a newer torch"
)
HERE = Path(__file__).parent
STEPS = 4
CHECKS = """
import torch
from simulated_device import Simulation, Watch, register

device = register()
with Simulation(), Watch.during(True):
    x = torch.arange(6.0, device=device, requires_grad=True)
    free = [(x * 2).sum().backward(), x + 1.0, x.detach().to("cpu", non_blocking=True), torch.rand(3, device=device)]
    free += [torch.zeros(size).pin_memory().to(device, non_blocking=True) for size in (3, 20_000)]
    assert not Watch.waits and x.grad.device == device, Watch.waits
    flags = x > 2
    waiting = {
        "item": lambda: float(x.sum()), "mask": lambda: x[flags], "nonzero": lambda: flags.nonzero(),
        "where": lambda: torch.where(flags), "any": lambda: bool(flags.any()), "list": lambda: x.tolist(),
        "host": lambda: x.cpu(), "device": lambda: torch.zeros(3).to(device),
        "tensor": lambda: torch.tensor([1.0], device=device), "new": lambda: x.new_tensor(2.0),
        "index": lambda: x[torch.tensor([1, 2])], "unique": lambda: x.detach().unique(),
        "repeat": lambda: x.repeat_interleave(torch.ones(6, dtype=torch.long, device=device)),
        "pageable": lambda: torch.zeros(20_000).to(device, non_blocking=True),
    }
    for name, wait in waiting.items():
        Watch.waits = []
        wait()
        assert Watch.waits, name
    Watch.waits = []
    z = torch.zeros(6, device=device)
    z[flags] = 1.0
    assert not Watch.waits and z.host.tolist() == [0, 0, 0, 1, 1, 1]
    with torch.autocast("sim", torch.bfloat16):
        product = x.view(2, 3) @ x.view(3, 2)
        assert product.dtype == torch.bfloat16 and (product * 2).dtype == torch.bfloat16
        assert product.softmax(0).dtype == product.exp().dtype == product.sum().dtype == torch.float32
        with torch.autocast("sim", enabled=False):
            assert (x.view(2, 3) @ x.view(3, 2)).dtype == torch.float32
    try:
        x + torch.zeros(6)
    except RuntimeError as error:
        assert "mixes devices" in str(error)
    else:
        raise AssertionError("mixed")
"""


def python(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def fit(config: str, store: Path, out: Path, *more: str) -> list[str]:
    return ["fit", "--config", f"configs/{config}.yaml", f"out={out}",
            f"data.store={store}", "data.num_workers=0", "data.batch_size=2", "module.warmup_steps=1",
            f"trainer.max_steps={STEPS}", f"trainer.val_every_n_steps={STEPS}",
            f"trainer.checkpoint_every_n_steps={STEPS}", f"trainer.log_every_n_steps={STEPS + 1}", *more]  # fmt: skip


def run(lines: list[list[str]]) -> list[dict[str, Any]]:
    results = json.loads(python(str(HERE / "simulated_device.py"), json.dumps(lines)).splitlines()[-1])
    assert len(results) == len(lines)
    return results


def test_the_simulation_sees_what_waits() -> None:
    python("-c", CHECKS)


def test_mae_and_retina_unet_wait_for_nothing(phantom_store: Path, tmp_path: Path) -> None:
    lines = [fit("pretrain/phantom_mae", phantom_store, tmp_path, "data.pool=all", "name=mae",
                 "+data.num_val_patches=3"),
             fit("detect/phantom", phantom_store, tmp_path, "name=retina", "data.augment.spatial=true",
                 "data.augment.intensity=true", "data.flip_axes=[0,1,2]")]  # fmt: skip
    assert run(lines) == [{"status": 0, "waits": []}] * 2


def run_on_two(lines: list[list[str]]) -> list[list[dict[str, Any]]]:
    """`run` of two processes that train together: what each of them says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(HERE / "simulated_processes.py"), json.dumps(lines)]
    started = [
        subprocess.Popen(command, env={**os.environ, **together, "LOCAL_RANK": str(rank)}, cwd=HERE.parent, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), said[0][1][-4000:] + said[1][1][-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.slow
def test_processes_exchange_only_what_lies_on_the_device_and_wait_for_nothing(
    phantom_store: Path, tmp_path: Path
) -> None:
    lines = [
        fit("detect/phantom", phantom_store, tmp_path, "name=retina"),
        *(fit(f"pretrain/phantom_{name}", phantom_store, tmp_path, "data.pool=all", f"name={name}",
              "+data.num_val_patches=3", *(line for line in RUNS[name].settings if "batch_size" not in line))
          for name in ("mae", "simclr", "supervised")),
    ]  # fmt: skip
    assert run_on_two(lines) == [[{"status": 0, "waits": []}] * len(lines)] * 2


@pytest.mark.slow
def test_no_pretraining_waits(phantom_store: Path, tmp_path: Path) -> None:
    lines = [
        fit(f"pretrain/phantom_{name}", phantom_store, tmp_path, "data.pool=all", f"name={name}",
            *(setting for setting in RUNS[name].settings if not setting.startswith("data.batch_size")))
        for name in RUNS
    ]  # fmt: skip
    assert dict(zip(RUNS, run(lines), strict=True)) == {name: {"status": 0, "waits": []} for name in RUNS}


DETECTION = {
    "nndetection": ("phantom", ("+module.detector.recipe=nndetection",)),
    "retinanet": ("phantom", ("module.detector.name=retinanet",)),
    "frozen": ("phantom", ("module.finetune={name: frozen}",)),
    "two_phase": ("phantom", ("module.finetune={name: two_phase, head_steps: 2}",)),
    "segresnet": ("phantom", ("backbone={name: segresnet}", "data.patch_size=[32,32,32]")),
    "primus": ("phantom", ("backbone={name: primus, embed_dim: 48, depth: 2, heads: 2, patch: 8, image_size: 24}",
                           "+module.detector.detection_levels=[0,1,2]")),
    "detr": ("phantom_detr", ("module.detector.denoising=20",)),
}  # fmt: skip


@pytest.mark.slow
def test_no_detector_waits_but_for_the_assignment_of_queries(phantom_store: Path, tmp_path: Path) -> None:
    lines = [fit(f"detect/{config}", phantom_store, tmp_path, f"name={name}", *more)
             for name, (config, more) in DETECTION.items()]  # fmt: skip
    results = dict(zip(DETECTION, run(lines), strict=True))
    assert all(result["status"] == 0 for result in results.values()), results
    copies = results.pop("detr")["waits"]
    assert all(result["waits"] == [] for result in results.values()), results
    assert len(copies) == 1 and copies[0].startswith("copy from sim to cpu @ detection/queries.py"), copies


@pytest.mark.slow
def test_what_was_trained_there_goes_on_and_predicts_there(
    phantom_store: Path, phantom_raw: Path, tmp_path: Path
) -> None:
    def detect(name: str, *more: str) -> list[str]:
        return fit("detect/phantom", phantom_store, tmp_path, f"name={name}", *more)

    swa = ("module.ema=null", "module.swa={start_step: 1, every_n_steps: 1}")
    image = phantom_raw / "imagesTs" / "test_000_0000.nii.gz"
    lines = [
        fit("pretrain/phantom_mae", phantom_store, tmp_path, "data.pool=all", "name=mae", "module.ema=0.9"),
        fit("pretrain/phantom_supervised", phantom_store, tmp_path, "data.pool=all", "name=supervised"),
        detect("det"), detect("det", f"trainer.max_steps={STEPS + 4}"), detect("swa", *swa),
        fit("detect/phantom_detr", phantom_store, tmp_path, "name=detr"),
        *(["test", f"{tmp_path / name}", "samples=0"] for name in ("mae", "supervised", "det", "swa", "detr")),
        ["sweep", f"{tmp_path / 'det'}"], ["predict", f"{tmp_path / 'det'}", f"{image}", f"out={tmp_path / 'found'}"],
        ["export", f"{tmp_path / 'mae'}", f"out={tmp_path / 'mae.pt'}"],
        detect("from-mae", f"transfer.path={tmp_path / 'mae.pt'}", "module.finetune={name: two_phase, head_steps: 2}"),
    ]  # fmt: skip
    results = run(lines)
    assert [result["status"] for result in results] == [0] * len(lines)
    assert results[3]["waits"] == results[-1]["waits"] == []  # resumed; with a new optimiser and graph on the way

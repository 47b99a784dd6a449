"""What a run costs: operations counted, peaks of GPUs, and what folders and tables say of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain3d.__main__ import main
from pretrain3d.backbones.primus import Primus
from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.files import write_text
from pretrain3d.modules.flop import ModelFlop
from pretrain3d.reporting.cost import cost_of, in_words
from pretrain3d.reporting.results import read_rows, write_json
from pretrain3d.reporting.run_folder import RunFolder
from pretrain3d.reporting.tables import cost_table
from pretrain3d.reporting.throughput import PEAKS, peak_flops


def counted(network: nn.Module, counter: Any) -> int:
    with counter:
        sum(level.sum() for level in network(torch.randn(2, 1, 32, 32, 32))).backward()
    return counter.flop if isinstance(counter, ModelFlop) else counter.get_total_flops()


def test_a_convolution_and_its_backward_pass_cost_what_the_definition_says() -> None:
    with ModelFlop() as counter:
        nn.Conv3d(3, 5, 3, padding=1)(torch.randn(2, 3, 4, 6, 8)).sum().backward()
    forward = 2 * (2 * 4 * 6 * 8) * 5 * 3 * 27
    assert counter.flop == 2 * forward  # the image needs no gradient: the kernel's alone


def test_cnn_is_counted_as_torch_does_and_checkpointing_is_no_model_flop() -> None:
    stages = ([8, 16, 32], [1, 1, 1], [1, 2, 2])
    plain, again = ResEnc(*stages), ResEnc(*stages, checkpointing=True)
    assert counted(plain, ModelFlop()) == counted(plain, FlopCounterMode(display=False))
    assert counted(again, ModelFlop()) == counted(plain, ModelFlop())
    assert counted(again, FlopCounterMode(display=False)) > counted(plain, ModelFlop())


def test_attention_on_a_cpu_is_counted() -> None:
    with torch.device("meta"):  # there torch takes attention apart into products
        reference, image = Primus(72, 4, 2, 8, 32), torch.empty(2, 1, 32, 32, 32)
        with FlopCounterMode(display=False) as counter:
            sum(level.sum() for level in reference(image)).backward()
    fused = Primus(72, 4, 2, 8, 32)
    assert counted(fused, FlopCounterMode(display=False)) < counter.get_total_flops()  # it is not known there
    assert counted(fused, ModelFlop()) == counter.get_total_flops()
    assert counted(Primus(72, 4, 2, 8, 32, checkpointing=True), ModelFlop()) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("gpu", "precision", "tflop"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4), ("NVIDIA H100 PCIe", "bf16-mixed", 756.0),
        ("NVIDIA H200", "bf16-mixed", 989.4), ("NVIDIA A100-SXM4-80GB", "16-mixed", 312.0),
        ("NVIDIA A100-SXM4-40GB", "32-true", 156.0), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16-mixed", None),
        ("NVIDIA A10G", "bf16-mixed", None), ("NVIDIA A40", "64-true", None), ("Tesla T4", "bf16-mixed", None),
    ],
)  # fmt: skip
def test_peaks(gpu: str, precision: str, tflop: float | None) -> None:
    assert peak_flops(gpu, precision) == (None if tflop is None else tflop * 1e12)


def test_no_gpu_has_two_peaks() -> None:
    names = ["B200", "H200", "H200 NVL", "H100 NVL", "GH200 480GB", "A100 80GB PCIe", "A10", "A40", "L4", "L40", "L40S"]
    assert all(sum(bool(re.fullmatch(pattern, name)) for pattern in PEAKS) == 1 for name in names)


def test_cost_of_a_run_folder(tmp_path: Path) -> None:
    assert set(cost_of(RunFolder(tmp_path)).values()) == {None}
    write_json(tmp_path / "state.json", {"status": "finished", "step": 50, "seconds": 90.0, "device": "a GPU"})
    lines = ["step,train/loss,perf/samples_seen,perf/patches_per_second,perf/tflop_per_second,perf/memory_gib,perf/mfu"]
    lines += ["5,1,,,,,", "10,1,80,4,8,1.5,0.25", "20,1,160,2,4,2.5,0.125", "30,1,240,3,6,2,0.5"]
    write_text(tmp_path / "metrics.csv", "\n".join(lines) + "\n")
    cost = cost_of(RunFolder(tmp_path))
    assert cost == {"steps": 50, "seconds": 90.0, "samples": 400, "device": "a GPU", "samples_per_second": 3.0,
                    "tflop_per_sample": 2.0, "memory_gib": 2.5, "mfu": 0.25}  # fmt: skip
    assert in_words(cost) == {
        "steps": "50", "samples": "400", "training time": "1 min 30 s", "samples/s": "3", "TFLOP/sample": "2",
        "peak GPU memory": "2.5 GiB", "MFU": "25.0%", "device": "a GPU",
    }  # fmt: skip


def test_table_of_costs() -> None:
    table = cost_table({"a": {"steps": 5, "mfu": None}, "b": {"steps": 7, "mfu": 0.5}, "a baseline": {}})
    assert table is not None
    assert table.header == ["run", "steps", "MFU"] and table.rows == [["a", "5", "–"], ["b", "7", "50.0%"]]
    assert cost_table({"a baseline": {}}) is None
    assert cost_table({"never began": {"steps": None, "device": None}}) is None


def test_a_run_that_made_no_step_has_nothing_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder(tmp_path / "mae").open({"name": "mae", "seed": 0, "module": {"name": "reconstruction"}})
    assert main(["table", str(tmp_path / "mae")]) == 2
    assert "there is nothing to show yet: mae has made no step" in capsys.readouterr().err


def test_a_frozen_backbone_costs_less_and_is_counted_again_when_it_is_freed(
    phantom_store: Path, tmp_path: Path
) -> None:
    line = ["fit", "--config", "configs/detect/phantom.yaml", "name=x", f"out={tmp_path}",
            f"data.store={phantom_store}", "data.batch_size=2", "data.num_workers=0", "module.warmup_steps=0",
            "trainer.max_steps=6", "trainer.val_every_n_steps=6", "trainer.log_every_n_steps=1",
            "trainer.accelerator=cpu", "module.overlap=0",
            "module.finetune={name: two_phase, head_steps: 4}"]  # fmt: skip
    assert main(line) == 0
    rows = [{key: float(text) for key, text in row.items()} for row in read_rows(tmp_path / "x" / "metrics.csv")]
    tflop = [row["perf/tflop_per_second"] / row["perf/patches_per_second"] for row in rows[2:]]
    frozen, free = tflop[:2], tflop[2:]
    assert frozen[0] == pytest.approx(frozen[1], rel=1e-6) and free[0] == pytest.approx(free[1], rel=1e-6)
    assert free[0] > 1.2 * frozen[0]


def test_a_run_counts_its_own_operations(phantom_store: Path, tmp_path: Path) -> None:
    common = ["fit", "--config", "configs/pretrain/phantom_mae.yaml", f"out={tmp_path}", f"data.store={phantom_store}",
              "data.pool=all", "data.patch_size=[16,16,16]", "module.warmup_steps=1", "trainer.max_steps=3",
              "trainer.val_every_n_steps=3", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu",
              "+data.num_val_patches=2"]  # fmt: skip
    for batch in (2, 4):
        assert main([*common, f"name=b{batch}", f"data.batch_size={batch}"]) == 0
    costs = [cost_of(RunFolder(tmp_path / name)) for name in ("b2", "b4")]
    assert costs[0]["tflop_per_sample"] == pytest.approx(costs[1]["tflop_per_sample"], rel=1e-6)  # logged in float32
    assert [cost["samples"] for cost in costs] == [6, 12]
    assert costs[0]["device"] and costs[0]["memory_gib"] is None
    assert len([row for row in read_rows(tmp_path / "b2" / "metrics.csv") if "perf/tflop_per_second" in row]) == 1

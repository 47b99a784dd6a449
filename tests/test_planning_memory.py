"""The memory of a training step: estimated, turned into patch and batch, and what is said when it runs out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny_store import tiny_store
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from pretrain3d.__main__ import main
from pretrain3d.backbones import BACKBONES
from pretrain3d.commands.settings import of_plan, with_levels
from pretrain3d.config import UserError
from pretrain3d.data.store import Store
from pretrain3d.detection.retina import RetinaUNet
from pretrain3d.devices import GIB, cpu_has_bf16, is_out_of_memory
from pretrain3d.planning import memory
from pretrain3d.planning.anchors import plan_levels, relative_strides
from pretrain3d.planning.counting import GpuAutocast
from pretrain3d.planning.memory import (
    Footprint,
    footprint,
    measure_step,
    out_of_memory_advice,
    pyramid,
    usable_bytes,
)
from pretrain3d.planning.patch import plan_patch
from pretrain3d.planning.plan import make_plan, write_plan
from pretrain3d.registry import build

SMALL = {"name": "retina_unet", "fpn_channels": 16, "num_convs": 1}
PRECISION = "bf16-mixed" if cpu_has_bf16() else "32-true"  # of a real step on this CPU


def test_a_step_needs_weights_and_activations() -> None:
    need = footprint("resenc_xs", SMALL, on_gpu=False)
    backbone = build(BACKBONES, {"name": "resenc_xs"}, "backbone", in_channels=1)
    weights = 4 * sum(parameter.numel() for parameter in backbone.parameters())
    multiple, strides = pyramid("resenc_xs")
    assert need.fixed > 5 * weights and need.multiple == multiple == strides[-1] == (16, 16, 16)
    # the finest level alone keeps the inputs of its three convolutions and norms, 8 channels of bf16
    assert need.per_voxel > 3 * 2 * 8 * 2
    assert footprint("resenc_xs", SMALL, on_gpu=False) is need  # measured once
    wide = footprint("resenc_xs", SMALL | {"num_convs": 2}, on_gpu=False)
    assert wide.per_voxel > need.per_voxel


def test_a_gpu_keeps_what_its_autocast_makes() -> None:
    """Group norms in float32, whose results and inputs are then four bytes a voxel; pooling in bf16."""
    on_cpu, on_gpu = (footprint("resenc_xxs", on_gpu=on_gpu) for on_gpu in (False, True))
    assert on_gpu.per_voxel > 1.5 * on_cpu.per_voxel and on_gpu.fixed == on_cpu.fixed  # wide heads at a fine stride
    with FakeTensorMode(), GpuAutocast():
        x = torch.empty(1, 4, 4, 4, 4)
        half = x.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert F.group_norm(half, 2).dtype == F.softmax(half, 1).dtype == half.softmax(1).dtype == torch.float32
            assert F.layer_norm(half, (4,)).dtype == F.interpolate(half, 8, mode="trilinear").dtype == torch.float32
            assert F.avg_pool3d(half, 2).dtype == F.conv3d(x, x).dtype == torch.bfloat16
        assert F.group_norm(half, 2).dtype == torch.bfloat16


def real_peak(size: int, batch_size: int) -> int:
    """Bytes of a real step on the CPU, from the allocator's own events, weights and input left out."""
    backbone = build(BACKBONES, {"name": "resenc_xs"}, "backbone", in_channels=1)
    anchors = {"sizes": [[4.0, 8.0, 16.0]] * 3}
    detector = RetinaUNet(backbone.levels, 1, anchors, fpn_channels=16, num_convs=1)
    image = torch.randn(batch_size, 1, size, size, size)
    boxes = torch.tensor([[4.0, 4, 4, 12, 12, 12]]).expand(batch_size, 1, 6)
    batch = {
        "image": image, "boxes": boxes, "labels": torch.zeros(batch_size, 1, dtype=torch.long),
        "valid": torch.ones(batch_size, 1, dtype=torch.bool), "mask": torch.zeros(batch_size, size, size, size).byte(),
    }  # fmt: skip
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = detector(backbone(image), (size,) * 3)
        loss = detector.loss(outputs, batch)["loss"]
        del outputs
        loss.backward()
    live = peak = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.slow
@pytest.mark.skipif(
    not cpu_has_bf16(), reason="needs a CPU with bf16; in float32 oneDNN's buffers count, half as much again"
)
def test_the_estimate_is_that_of_a_real_step() -> None:
    need = footprint("resenc_xs", SMALL, on_gpu=False)
    for size, batch_size in ((48, 1), (48, 2), (80, 1)):
        estimate = need.bytes((size,) * 3, batch_size) - need.fixed
        assert estimate == pytest.approx(real_peak(size, batch_size), rel=0.25), (size, batch_size)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_estimate_is_that_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # whose trials take memory; an earlier `fit` set it
    need, size, count = footprint("resenc_s"), (128, 128, 128), 2
    measured = measure_step("resenc_s", "retina_unet", size, count, torch.device("cuda"))
    assert measured == pytest.approx(need.bytes(size, count), rel=0.25)
    assert torch.cuda.max_memory_reserved() < 1.15 * 1.25 * need.bytes(size, count)


@pytest.mark.parametrize(
    ("detector", "off"),
    [
        (SMALL, 0.25),
        pytest.param("retina_unet", 0.25, marks=pytest.mark.slow),
        pytest.param("deformable_detr", 0.4, marks=pytest.mark.slow),
    ],
)
def test_a_measured_step_is_about_the_estimate(detector: str | dict[str, Any], off: float) -> None:
    size, count = (48, 48, 48), 2
    measured = measure_step("resenc_xxs", detector, size, count, torch.device("cpu"), precision=PRECISION)
    need = footprint("resenc_xxs", detector, precision=PRECISION, on_gpu=False)
    assert measured == pytest.approx(need.bytes(size, count), rel=off)


@pytest.mark.parametrize("fits", [True, False])
def test_a_plan_is_tried_where_a_gpu_is(
    fits: bool, phantom_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(*arguments: Any) -> int:
        asked.append(arguments)
        if not fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 3 * GIB // 2

    asked: list[Any] = []
    gpu = SimpleNamespace(total_memory=8 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(memory, "measure_step", step)
    before = (phantom_store / "plan.yaml").read_text()
    try:
        assert main(["plan", str(phantom_store), "patch_size=32"]) == (0 if fits else 2)
        plan = yaml.safe_load((phantom_store / "plan.yaml").read_text())
        printed = capsys.readouterr()
        detector = {"name": "retina_unet", "detection_levels": [1, 2, 3, 4]}  # the step has the planned levels
        assert asked[0][:4] == ("resenc_xs", detector, [32, 32, 32], 4)
        if fits:
            assert plan["planned_for"]["measured_gb"] == 1.5 and "measured 1.5 GiB" in printed.out
            assert main(["plan", str(phantom_store), "patch_size=32", "memory_gb=24"]) == 0  # for another machine
            assert len(asked) == 1
        else:
            assert "does not fit on a GPU" in printed.err and "memory_gb=6" in printed.err
            assert (phantom_store / "plan.yaml").read_text() == before
    finally:
        (phantom_store / "plan.yaml").write_text(before)


def need_of(per_voxel: float, multiple: int = 16) -> Footprint:
    m = (multiple, multiple, multiple)
    return Footprint(10**6, 0.0, per_voxel, m)


def gigabytes(need: Footprint, patch: tuple[int, ...], batch: int) -> float:
    """Memory into which just that fits."""
    return next(g / 100 for g in range(60, 10**6) if usable_bytes(g / 100) >= need.bytes(patch, batch))


def test_batch_then_patch_then_batch() -> None:
    need = need_of(3000.0)

    def planned(patch: tuple[int, ...], batch: int, objects: tuple[int, ...] = (0, 0, 0)) -> tuple[object, ...]:
        found = plan_patch((200, 180, 90), (128, 128, 128), need, gigabytes(need, patch, batch), 4, objects)
        assert found.bytes <= usable_bytes(gigabytes(need, patch, batch))
        return found.patch_size, found.batch_size, found.accumulate

    assert planned((128, 128, 96), 4) == ((128, 128, 96), 4, 1)
    assert planned((128, 128, 96), 2) == ((128, 128, 96), 2, 2)
    # z holds the largest share of the volume (96 of 90), then y (128 of 180)
    assert planned((128, 128, 80), 2) == ((128, 128, 80), 2, 2)
    assert planned((128, 112, 80), 2, objects=(20, 20, 20)) == ((128, 128, 64), 2, 2)
    assert planned((128, 112, 80), 2, objects=(20, 20, 70)) != ((128, 128, 64), 2, 2)
    # an object as large as the patch: rather one patch at once than a smaller one
    assert planned((128, 128, 96), 1, objects=(128, 128, 96)) == ((128, 128, 96), 1, 4)


def test_small_volumes_and_odd_batches() -> None:
    need = need_of(100.0)
    assert plan_patch((37, 50, 35), (128, 128, 128), need, 8).patch_size == (48, 64, 48)
    assert plan_patch((10, 12, 9), (128, 128, 128), need, 8).patch_size == (16, 32, 16)  # never a single position
    assert plan_patch((60, 60, 60), (32, 64, 16), need, 8, batch_size=6).batch_size == 6
    tight = plan_patch((64, 64, 64), (64, 64, 64), need, gigabytes(need, (64, 64, 64), 3), 6)
    assert (tight.batch_size, tight.accumulate) == (3, 2)
    tight = plan_patch((64, 64, 64), (64, 64, 64), need, gigabytes(need, (64, 64, 64), 3) + 0.01, 8)
    assert (tight.batch_size, tight.accumulate) == (2, 4)  # 3 would not divide 8
    with pytest.raises(UserError, match=r"memory_gb=1: the smallest patch, 16 x 16 x 32, needs .* take a smaller"):
        plan_patch((64, 64, 64), (64, 64, 64), need_of(10**6), 1)
    with pytest.raises(UserError, match=r"memory_gb=0\.2: at least 1 is needed"):
        usable_bytes(0.2)


def test_small_objects_get_a_finer_level() -> None:
    strides = [(s, s, s) for s in (1, 2, 4, 8, 16, 32)]
    usual, flat = torch.full((9, 3), 8.0), torch.tensor([[8.0, 8, 2]]).repeat(9, 1)
    assert plan_levels(strides, usual) == (2, 3, 4, 5)
    assert plan_levels(strides, flat) == (1, 2, 3, 4, 5)
    assert plan_levels(strides[:5], flat - 1) == (1, 2, 3, 4)  # never the first
    few_large = torch.tensor([[8.0, 8, 3]] * 5 + [[8.0, 8, 40]] * 4)  # half of them, whatever their mean
    assert plan_levels(strides, few_large) == (1, 2, 3, 4, 5)
    anisotropic = [(1, 1, 1), (2, 2, 1), (4, 4, 2), (8, 8, 4)]
    assert relative_strides(anisotropic, (1, 2, 3)) == [(1, 1, 1), (2, 2, 2), (4, 4, 4)]
    assert relative_strides([(2, 2, 1), (4, 4, 1)], (0, 1)) == [(1, 1, 1), (2, 2, 1)]


SETTINGS = {
    "data": {"batch_size": 4, "store": "s"},
    "trainer": {"accumulate_grad_batches": 1},
    "backbone": {"name": "resenc_xs"},
}


def test_out_of_memory_says_what_to_lower() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("shapes differ"))
    said = out_of_memory_advice(SETTINGS, 4, (96, 96, 96))
    assert "data.batch_size=2 trainer.accumulate_grad_batches=2" in said and "\n" not in said
    assert "patches of 96 x 96 x 96" in said and "+backbone.checkpointing=true" in said
    assert "+trainer.precision=bf16-mixed" in said and "module.detector" not in said
    accumulated = SETTINGS | {"trainer": {"accumulate_grad_batches": 3}}
    said = out_of_memory_advice(accumulated, 4, (96, 96, 96))
    assert "data.batch_size=2 trainer.accumulate_grad_batches=6 (the same effective batch)" in said
    single = SETTINGS | {"data": {"batch_size": 1}, "backbone": {"name": "resenc_xs", "checkpointing": True}}
    single["trainer"] = {"precision": "bf16-mixed"}
    said = out_of_memory_advice(single, 1, (96, 96, 96))
    assert "accumulate" not in said and "checkpointing" not in said and "a smaller data.patch_size" in said
    assert "precision" not in said
    single["module"] = {"detector": {"name": "deformable_detr"}}
    assert "+module.detector.checkpointing=true" in out_of_memory_advice(single, 1, (96, 96, 96))
    single["module"] = {"detector": {"name": "deformable_detr", "checkpointing": True}}
    assert "checkpointing" not in out_of_memory_advice(single, 1, (96, 96, 96))
    single["module"] = {"detector": {"name": "retina_unet"}}
    assert "checkpointing" not in out_of_memory_advice(single, 1, (96, 96, 96))
    assert "3 tiles" in out_of_memory_advice(SETTINGS, 4, (96, 96, 96), tile_batch=3)
    least = {"data": {}, "trainer": {}, "backbone": {"name": "resenc_xs"}}
    said = out_of_memory_advice(least, 2, (96, 96, 96))
    assert "data.batch_size=2" in said and "+data.batch_size=1 +trainer.accumulate_grad_batches=2 " in said


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, with the plan that `prepare` would make."""
    made = tiny_store(tmp_path_factory.mktemp("planned") / "store")
    write_plan(made.path / "plan.yaml", make_plan(made, memory_gb=8), made)
    return made.path


def test_the_command_plans_again_and_fit_takes_it(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store / "plan.yaml"
    edited = yaml.safe_load(path.read_text())
    edited["intensity"] |= {"low": [-100.0], "high": [100.0]}
    path.write_text(yaml.safe_dump(edited))
    capsys.readouterr()
    assert main(["plan", str(store), "memory_gb=0.9", "patch_size=64"]) == 0
    said = capsys.readouterr().out
    plan = yaml.safe_load(path.read_text())
    assert plan["intensity"] == edited["intensity"] and plan["spacing_mm"] == edited["spacing_mm"]
    assert plan["batch_size"] * plan["accumulate_grad_batches"] == 4 and plan["batch_size"] < 4
    assert max(plan["patch_size"]) <= 64 and plan["planned_for"]["memory_gb"] == 0.9
    assert f"batch_size: {plan['batch_size']}, was {edited['batch_size']}" in said and "0.9 GiB (named)" in said
    assert usable_bytes(0.9) >= plan["planned_for"]["estimated_gb"] * GIB * 0.99

    settings = SETTINGS | {
        "data": {"store": str(store), "batch_size": None},
        "trainer": {"accumulate_grad_batches": None},
    }
    taken = of_plan(settings)
    assert taken["data"]["batch_size"] == plan["batch_size"]
    assert taken["trainer"]["accumulate_grad_batches"] == plan["accumulate_grad_batches"]
    assert settings["data"]["batch_size"] is None
    with pytest.raises(UserError, match=r"plan.yaml is for resenc_xs; call `pretrain3d plan .* backbone=resenc_l`"):
        of_plan(settings | {"backbone": {"name": "resenc_l"}})
    assert with_levels({"name": "retina_unet"}, plan, "resenc_xs")["detection_levels"] == plan["detection_levels"]
    for detector, backbone in (({"name": "retina_unet"}, "resenc_l"),
                               ({"name": "retina_unet", "anchors": {"boxes": [[1, 2, 3]]}}, "resenc_xs"),
                               ({"name": "deformable_detr"}, "resenc_xs")):  # fmt: skip
        assert with_levels(detector, plan, backbone) == detector


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plan takes one store, got 0"),
        (["{store}", "backbone=resnc_s"], "unknown backbone 'resnc_s', did you mean"),
        (["{store}", "memory_gb=much"], "memory_gb=much: expected a number of GiB"),
        (["{store}", "memory_gb=0.2"], "memory_gb=0.2: at least 1 is needed"),
        (["{store}", "patch_size=50"], "patch_size must be three multiples of 16"),
        (["{store}", "batch_size=0"], "batch_size=0: at least 1"),
    ],
)
def test_mistakes(arguments: list[str], message: str, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *(argument.format(store=store) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["patch_size: [16, 16, 16]\n", "a: [", "words\n"])
def test_what_is_said_of_a_bad_plan_repairs_it(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tiny_store(tmp_path / "store").path
    (store / "plan.yaml").write_text(text)
    line = ["plan", str(store), "memory_gb=0.9", "patch_size=32"]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert f"delete the file and call `pretrain3d plan {store}`" in error and error.count("\n") == 1
    (store / "plan.yaml").unlink()
    assert main(line) == 0 and Store(store).plan["patch_size"]

"""VoCo's labels and both forms of its loss, against their definitions; the teacher through a run."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_store import tiny_store
from torch import nn

from pretrain3d.__main__ import main
from pretrain3d.backbones.contract import Level
from pretrain3d.backbones.decoders import UNetDecoder
from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.config import UserError
from pretrain3d.objectives.crops import grid_positions, overlaps, random_positions
from pretrain3d.objectives.voco import VoCo

LEVELS = (Level(4, (1, 1, 1)), Level(6, (2, 2, 2)))
T, N, B = 3, 6, 3  # targets, bases (a grid of 3 x 2 x 1), volumes
REGION = (12, 8, 4)


def small(form: str, **arguments) -> VoCo:
    arguments = {"grid": (3, 2, 1), "targets": T, "hidden": 16, "embedding": 5, **arguments}
    return VoCo(LEVELS, 1, REGION, UNetDecoder, bases=form, **arguments)


def draws(batch: int = B, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + sample) for sample in range(batch)]


@pytest.mark.parametrize(("grid", "size"), [((4, 4, 1), (4, 4, 5)), ((3, 3, 1), (3, 4, 4)), ((2, 2, 2), (4, 3, 5))])
def test_labels_by_counting_voxels(grid, size):
    region = [count * side for count, side in zip(grid, size, strict=True)]
    bases = grid_positions(size, grid)
    targets = random_positions(region, size, 5, torch.Generator().manual_seed(1))
    labels = overlaps(targets, bases, size)
    owner = np.full(region, -1)
    for number, (x, y, z) in enumerate(bases.tolist()):
        place = owner[x : x + size[0], y : y + size[1], z : z + size[2]]
        assert place.shape == size and (place == -1).all()  # the grid tiles the region
        place[:] = number
    for row, (x, y, z) in zip(labels, targets.tolist(), strict=True):
        held = owner[x : x + size[0], y : y + size[1], z : z + size[2]]
        assert row.tolist() == pytest.approx([np.mean(held == number) for number in range(len(bases))], abs=1e-6)
    torch.testing.assert_close(labels.sum(1), torch.ones(5))
    assert ((labels > 0).sum(1) <= 2 ** sum(count > 1 for count in grid)).all()


def test_a_target_on_a_base_is_that_base():
    labels = overlaps(torch.tensor([[64, 64, 0]]), grid_positions((64, 64, 64), (3, 3, 1)), (64, 64, 64))
    assert labels.tolist() == [[0, 0, 0, 0, 1, 0, 0, 0, 0]]


def test_crops_and_labels_of_the_reference_geometry():
    """Two regions of 256 x 256 x 64: 40 crops of 64^3, 32 of them bases; a target overlaps four of them."""
    region = (256, 256, 64)
    method = VoCo(LEVELS, 1, region, UNetDecoder, (4, 4, 1), 4, hidden=8, embedding=4)
    images = torch.stack([torch.arange(256 * 256 * 64, dtype=torch.float32).view(1, *region)] * 2)
    prepared = method.prepare({"image": images}, draws(2))
    assert prepared["inputs"].shape == (2, 20, 1, 64, 64, 64) and prepared["labels"].shape == (2, 4, 16)
    bases = prepared["inputs"][0, 4:, 0].view(4, 4, 64, 64, 64)  # together they are the region
    assert torch.equal(bases.permute(0, 2, 1, 3, 4).reshape(region), images[0, 0])
    torch.testing.assert_close(prepared["labels"].sum(-1), torch.ones(2, 4))
    corners = prepared["inputs"][:, :4, 0, 0, 0, 0].long()  # the first voxel of each target says where it lies
    x, y = corners // (256 * 64), corners // 64 % 256
    assert (x % 64).all() and (y % 64).all(), "no target on the grid, so that each overlaps four bases"
    assert ((prepared["labels"] > 0).sum(-1) == 4).all()
    largest = prepared["labels"].argmax(-1)
    assert torch.equal(largest, (x + 32) // 64 * 4 + (y + 32) // 64)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return max(0.0, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))


def stop_gradient_by_loops(y: np.ndarray, t: np.ndarray, b: np.ndarray) -> dict[str, float]:
    positive, negative, between = [], [], []
    for v in range(B):
        for i in range(T):
            for j in range(N):
                s = cosine(t[v, i], b[v, j])
                positive.append(y[v, i, j] * -math.log(1 - abs(y[v, i, j] - s) + 1e-6))
                if y[v, i, j] == 0:
                    negative.append(s**2)
        between.append(2 / (N * (N - 1)) * sum(cosine(b[v, i], b[v, j]) for i, j in combinations(range(N), 2)))
    return {"positive": sum(positive) / y.sum(), "negative": np.mean(negative), "regularisation": np.mean(between)}


def cross_entropy_by_loops(y: np.ndarray, s: np.ndarray) -> tuple[float, float]:
    pairs = list(zip(y.ravel(), s.ravel(), strict=True))
    positive = sum(-a * math.log(1 - abs(a - c) + 1e-6) for a, c in pairs) / (y.sum() + 1e-6)
    negative = sum(-math.log(1 - c + 1e-6) for a, c in pairs if a == 0) / (sum(a == 0 for a, _ in pairs) + 1e-6)
    return positive, negative


def teacher_by_loops(y: np.ndarray, t: np.ndarray, b: np.ndarray, tt: np.ndarray, tb: np.ndarray) -> dict[str, float]:
    def table(x: np.ndarray, z: np.ndarray, shift: int) -> np.ndarray:
        rows = [[[cosine(x[v, i], z[(v + shift) % B, j]) for j in range(N)] for i in range(T)] for v in range(B)]
        return np.asarray(rows)

    positive, negative = cross_entropy_by_loops(y, table(t, tb, 0))
    inter = sum(cross_entropy_by_loops(table(tt, tb, 1), table(t, b, 1)))
    between = [cosine(b[v, i], b[v, j]) ** 2 for v in range(B) for i, j in combinations(range(N), 2)]
    return {"positive": positive, "negative": negative, "inter": inter, "regularisation": np.mean(between)}


@pytest.mark.parametrize("form", ["stop_gradient", "teacher"])
def test_loss_by_loops(form):
    method = small(form)
    prepared = method.prepare({"image": torch.randn(B, 1, *REGION)}, draws())
    embeddings, teacher = torch.randn(B, T + N, 5), torch.randn(B, T + N, 5)
    outputs = {"embeddings": embeddings, "teacher": teacher, "labels": prepared["labels"]}
    losses = method.loss(outputs, prepared)
    y = prepared["labels"].double().numpy()
    assert (y == 0).any()
    parts = [array[:, rows].double().numpy() for array in (embeddings, teacher) for rows in (slice(T), slice(T, None))]
    expected = teacher_by_loops(y, *parts) if form == "teacher" else stop_gradient_by_loops(y, *parts[:2])
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name
    assert losses["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-4)
    assert losses["loss"].dtype == torch.float32
    flat = y.reshape(-1)
    negative = (lambda c: c * c) if form == "stop_gradient" else (lambda c: -math.log(1 - c + 1e-6))
    levels = [
        sum(a * -math.log(1 - abs(a - c) + 1e-6) for a in flat) / flat.sum() + negative(c)
        for c in np.linspace(0, 1, 21)
    ]
    assert losses["trivial"].item() == pytest.approx(min(levels), rel=1e-4)


def test_report_says_whether_targets_find_their_place():
    method = small("stop_gradient")
    labels = torch.zeros(B, T, N)
    labels[:, :, 2] = 1.0
    bases = torch.eye(N).expand(B, -1, -1)
    found = torch.cat([bases[:, 2:3].expand(-1, T, -1), bases], dim=1)
    losses = method.loss({"embeddings": found, "labels": labels}, {})
    assert losses["top1"].item() == 1.0
    assert losses["similarity_entropy"].item() == pytest.approx(0.0, abs=1e-3)
    assert losses["loss"].item() == pytest.approx(0.0, abs=1e-3)
    lost = method.loss({"embeddings": torch.ones(B, T + N, N), "labels": labels}, {})
    assert lost["similarity_entropy"].item() == pytest.approx(1.0)
    assert lost["embedding_std"].item() == pytest.approx(0.0, abs=1e-3)


def test_bases_stand_still():
    """In the first form bases learn from the regularisation alone; in the second the teacher learns nothing."""
    method = small("stop_gradient")
    prepared = method.prepare({"image": torch.randn(B, 1, *REGION)}, draws())
    embeddings = torch.randn(B, T + N, 5, requires_grad=True)
    losses = method.loss({"embeddings": embeddings, "labels": prepared["labels"]}, prepared)
    (gradient,) = torch.autograd.grad(losses["positive"] + losses["negative"], embeddings, retain_graph=True)
    assert gradient[:, T:].eq(0).all() and gradient[:, :T].ne(0).any()
    (gradient,) = torch.autograd.grad(losses["regularisation"], embeddings)
    assert gradient[:, :T].eq(0).all() and gradient[:, T:].ne(0).any()
    second = small("teacher")
    assert not any(parameter.requires_grad for parameter in second.teacher.parameters())
    outputs = {"embeddings": embeddings, "teacher": torch.randn(B, T + N, 5), "labels": prepared["labels"]}
    losses = second.loss(outputs, prepared)
    (gradient,) = torch.autograd.grad(losses["positive"] + losses["negative"], embeddings, retain_graph=True)
    assert gradient[:, T:].eq(0).all() and gradient[:, :T].ne(0).any()  # within a volume the teacher's bases count
    (gradient,) = torch.autograd.grad(losses["inter"], embeddings, retain_graph=True)
    assert gradient[:, T:].ne(0).any() and gradient[:, :T].ne(0).any()  # between volumes the projector's own


@pytest.mark.parametrize("form", ["stop_gradient", "teacher"])
def test_every_parameter_learns_and_the_loss_is_float32_under_bf16(form):
    backbone = ResEnc([4, 6], [1, 1], [1, 2])
    method = small(form, feature_dropout=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        prepared = method.prepare({"image": torch.randn(B, 1, *REGION)}, draws())
        outputs = method(backbone, prepared)
    assert outputs["embeddings"].shape == (B, T + N, 5) and outputs["embeddings"].dtype == torch.float32
    method.loss(outputs, prepared)["loss"].backward()
    for name, parameter in nn.ModuleDict({"backbone": backbone, "method": method}).named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(picture.shape == (4, 4) for picture in method.pictures(outputs, prepared).values())


def test_teacher_follows_the_projector():
    method = small("teacher", momentum=0.75)
    before = method.teacher[0].weight.clone()
    with torch.no_grad():
        method.projector[0].weight += 1.0
    method.after_step()
    torch.testing.assert_close(method.teacher[0].weight, before + 0.25)


def test_dropout_is_the_students_and_of_training_only():
    backbone = ResEnc([4, 6], [1, 1], [1, 2])
    method = small("teacher", feature_dropout=0.5)
    prepared = method.prepare({"image": torch.randn(B, 1, *REGION)}, draws())
    assert 0.4 < prepared["kept"].float().mean().item() < 0.6
    with torch.no_grad():
        outputs = method(backbone, prepared)
        quiet = method.eval()(backbone, prepared)
    assert not torch.equal(outputs["embeddings"], outputs["teacher"])
    torch.testing.assert_close(quiet["embeddings"], quiet["teacher"])  # equal weights at the start
    torch.testing.assert_close(quiet["teacher"], outputs["teacher"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (5, 2, 1)}, "does not divide data.patch_size"),
        ({"grid": (1, 1, 1)}, "into two or more crops"),
        ({"targets": 0}, "targets=0 must be at least 1"),
        ({"momentum": 1.0}, "from 0 to below 1"),
        ({"hidden_layers": 0}, "hidden_layers is 0; at least 1"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        small("teacher", **arguments)


def test_comparing_volumes_needs_two():
    method = small("teacher")
    with pytest.raises(UserError, match=r"data.batch_size is 1, take 2 or more"):
        method.check_batch(1, 1)
    method.check_batch(1, 2)
    small("stop_gradient").check_batch(1, 1)
    prepared = method.prepare({"image": torch.randn(1, 1, *REGION)}, draws(1))
    outputs = {name: torch.randn(1, T + N, 5) for name in ("embeddings", "teacher")}
    outputs["labels"] = prepared["labels"]
    assert method.eval().loss(outputs, prepared)["loss"].isfinite()  # the last batch of a validation may be short


TINY = [
    "data.pool=train", "data.patch_size=[32,32,16]", "data.batch_size=2", "data.num_workers=0", "data.intensity=null",
    "+data.num_val_patches=4", "backbone={name: resenc, channels: [4, 8], blocks: [1, 1], strides: [1, 2]}",
    "module.warmup_steps=1", "trainer.checkpoint_every_n_steps=1", "trainer.val_every_n_steps=2",
    "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "trainer.precision=32-true",
]  # fmt: skip


def fit(folder: Path, *more: str) -> None:
    common = [f"out={folder}", f"data.store={folder / 'store'}", *TINY]
    method = ["module.method.hidden=16", "module.method.embedding=8", "+module.method.grid=[2,2,1]"]
    line = ["fit", "--config", "configs/pretrain/phantom_voco_v2.yaml", *common, "module.schedule=constant", *method]
    assert main([*line, *more]) == 0


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_teacher_is_in_the_checkpoint_and_not_in_the_export(tmp_path: Path) -> None:
    tiny_store(tmp_path / "store")
    fit(tmp_path, "name=voco", "trainer.max_steps=2")
    teacher, projector = (weights(tmp_path, "voco")[f"method.{name}.0.weight"] for name in ("teacher", "projector"))
    assert not torch.equal(teacher, projector)
    assert main(["export", str(tmp_path / "voco"), f"out={tmp_path / 'voco.pt'}"]) == 0
    exported = torch.load(tmp_path / "voco.pt", weights_only=True)
    names = [name.removeprefix("backbone.") for name in weights(tmp_path, "voco") if name.startswith("backbone.")]
    assert sorted(exported["weights"]) == sorted(names)
    line = ["fit", "--config", "configs/detect/phantom.yaml", "name=det", f"out={tmp_path}", *TINY[3:],
            f"data.store={tmp_path / 'store'}", "data.patch_size=[16,16,16]", "data.num_workers=0", "data.batch_size=2",
            "data.intensity=null", f"transfer.path={tmp_path / 'voco.pt'}", "trainer.max_steps=1",
            "trainer.val_every_n_steps=1", "module.warmup_steps=0", "module.overlap=0",
            "module.detector.detection_levels=[1]"]  # fmt: skip
    assert main([word for word in line if "num_val_patches" not in word]) == 0
    assert exported["source"]["method"] == "voco"


@pytest.mark.slow
def test_resumed_teacher_equals_one_that_was_not_interrupted(tmp_path: Path) -> None:
    tiny_store(tmp_path / "store")
    fit(tmp_path, "name=whole", "trainer.max_steps=4")
    fit(tmp_path, "name=resumed", "trainer.max_steps=2")
    fit(tmp_path, "name=resumed", "trainer.max_steps=4")
    whole, resumed = weights(tmp_path, "whole"), weights(tmp_path, "resumed")
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "resumed")]
    assert len(rows[0]) == len(rows[1]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stop_gradient", "teacher"])
def test_it_learns_where_crops_lie(form):
    """One anatomy, different everywhere: positive + negative fall by more than a fifth, below the trivial level."""
    torch.manual_seed(0)
    region = (24, 24, 8)
    backbone = ResEnc([8, 16], [1, 1], [1, 2])
    method = VoCo(backbone.levels, 1, region, UNetDecoder, (3, 3, 1), 4, form, hidden=64, embedding=32,
                  hidden_layers=1 if form == "teacher" else 2)  # fmt: skip
    parameters = [p for p in (*backbone.parameters(), *method.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    x, y, _ = torch.meshgrid(*[torch.linspace(0.5, 2.5, size) for size in region], indexing="ij")
    anatomy = torch.sin(8 * x**2) + torch.sin(8 * y**2)  # finer and finer along both axes
    history = []
    for step in range(40):
        image = anatomy + 0.1 * torch.randn(4, 1, *region)
        prepared = method.prepare({"image": image}, draws(4, seed=10 * step))
        losses = method.loss(method(backbone, prepared), prepared)
        optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        method.after_step()
        history.append([(losses["positive"] + losses["negative"]).item(), losses["trivial"].item()])
    first, last = np.mean(history[:3], axis=0), np.mean(history[-5:], axis=0)
    assert last[0] < 0.8 * first[0] and last[0] < 0.8 * last[1]
    assert losses["embedding_std"].item() > 0.5

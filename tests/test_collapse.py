"""Collapse monitors and the probe: against their definitions, and through runs that collapse and runs that do not."""

from __future__ import annotations

import csv
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_store import blocks, image_of, make_case, write_store

from pretrain3d.__main__ import main
from pretrain3d.backbones import BACKBONES
from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.data.normalise import Normalisation
from pretrain3d.data.probe import VOXELS, ProbePatches
from pretrain3d.data.store import Store
from pretrain3d.evaluation.probe import auroc, neighbour_votes, probe
from pretrain3d.modules.monitors import asked, features_at
from pretrain3d.objectives import PRETRAINING
from pretrain3d.objectives.collapse import MIN_STD, effective_rank, spread, warning
from pretrain3d.objectives.projection import pooled_views
from pretrain3d.objectives.simclr import SimCLR


def test_spread_is_the_root_of_the_summed_variances():
    features = torch.randn(50, 6) + 2
    unit = features / features.norm(dim=1, keepdim=True)
    expected = math.sqrt(sum(unit[:, c].double().var(correction=0).item() for c in range(6)))
    assert spread(features).item() == pytest.approx(expected, rel=1e-5)
    assert spread(1000 * features).item() == pytest.approx(expected, rel=1e-5)  # lengths do not count
    assert spread(torch.randn(4000, 64)).item() == pytest.approx(1.0, abs=0.01)
    assert spread(torch.ones(9, 6)).item() == pytest.approx(0.0, abs=1e-6)
    assert spread(torch.zeros(9, 6)).item() == 0.0  # answering nothing is a collapse too


def test_effective_rank_of_known_spectra():
    def about_a_far_point(lengths: list[float]) -> torch.Tensor:
        steps = torch.zeros(2 * len(lengths), 8, dtype=torch.float64)
        for axis, length in enumerate(lengths):
            steps[2 * axis, axis], steps[2 * axis + 1, axis] = length, -length
        steps[:, 7] = 1e6  # so that scaling to length 1 bends nothing
        return steps

    assert effective_rank(about_a_far_point([1, 1, 1, 1])).item() == pytest.approx(4, rel=1e-3)
    assert effective_rank(about_a_far_point([1, 0, 0, 0])).item() == pytest.approx(1, rel=1e-2)
    shares = np.asarray([0.5, 0.3, 0.2])
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(about_a_far_point([5, 3, 2])).item() == pytest.approx(expected, rel=1e-3)


def test_warning_names_what_collapsed_and_keeps_quiet_otherwise():
    assert warning("features", 64, 0.2, 30.0) is None
    assert "the features have collapsed: those of 64 different patches" in (warning("features", 64, 1e-4, 30.0) or "")
    assert "embeddings have collapsed onto a line" in (warning("embeddings", 64, 0.5, 1.1) or "")
    assert "collapsed" in (warning("features", 64, math.nan, 5.0) or "")
    assert warning("features", 4, 0.0, 1.0) is None  # too few to say
    assert warning("features", 64, 5e-3, 3.0, min_std=1e-3) is None
    assert "differ by 5.0e-04 of their length (healthy: above 0.001)" in (
        warning("features", 64, 5e-4, 3.0, min_std=1e-3) or ""
    )


def test_votes_by_loops():
    rng = np.random.default_rng(0)
    features, present = rng.normal(size=(20, 5)) * [1, 10, 0.1, 1, 0] + 3, rng.random((20, 2)) < 0.5
    groups, known = np.repeat(np.arange(5), 4), rng.random((20, 2)) < 0.7
    known[:, 1] &= groups < 2  # of the second class fewer than three may be there to ask
    known[4:7, 1] = False
    votes = neighbour_votes(features, present, known, groups, neighbours=3)
    scaled = features - features.mean(0)
    scaled[:, :4] /= features.std(0)[:4]
    for i in range(20):
        others = [j for j in range(20) if groups[j] != groups[i]]
        cosine = {j: scaled[i] @ scaled[j] / np.linalg.norm(scaled[i]) / np.linalg.norm(scaled[j]) for j in others}
        for label in range(2):
            asked = [j for j in others if known[j, label]]
            nearest = sorted(asked, key=lambda j: -cosine[j])[:3]
            assert votes[i, label] == pytest.approx(present[nearest, label].mean())


def test_auroc_by_pairs():
    rng = np.random.default_rng(0)
    scores, present = rng.integers(0, 4, 30).astype(float), rng.random(30) < 0.4
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[present] for b in scores[~present]]
    assert auroc(scores, present) == pytest.approx(np.mean(wins))


def test_probe_tells_features_that_know_from_features_that_do_not():
    rng = np.random.default_rng(0)
    present, groups = rng.random((120, 3)) < 0.5, np.arange(120) % 12
    known = np.ones((120, 3), dtype=bool)
    knowing = present @ rng.normal(size=(3, 16)) + 0.3 * rng.normal(size=(120, 16))
    assert probe(knowing, present, known, groups) > 0.95
    assert probe(rng.normal(size=(120, 16)), present, known, groups) == pytest.approx(0.5, abs=0.1)
    assert probe(knowing, present, known, np.zeros(120, dtype=int)) is None  # one patient: nobody to ask
    assert probe(knowing, known, known, groups) is None  # each voxel is of it: nothing to tell
    unsaid = rng.random((120, 3)) < 0.5  # organs that were there and not annotated are neither votes nor errors
    assert probe(knowing, present & ~unsaid, ~unsaid, groups) > 0.95 > probe(knowing, present & ~unsaid, known, groups)
    assert probe(knowing, present, np.zeros_like(known), groups) is None


def organ_store(path: Path) -> Store:
    """Eight cases of noise."""
    cases = []
    for number in range(8):
        image, mask = image_of((40, 20, 20), number), blocks((40, 20, 20), [])
        cases.append((make_case(f"case_{number}", image, mask, []), image, mask))
    return write_store(path, cases)


def wavy_store(path: Path) -> Store:
    """Twelve cases, each with waves of its own length and direction in each place."""
    cases, axes = [], np.stack(np.meshgrid(*[np.arange(32)] * 3, indexing="ij"))
    for number in range(12):
        waves = np.tensordot(np.random.default_rng(number).normal(size=3), axes**1.3, 1)
        image, mask = (150 * np.sin(waves / 4))[None].astype(np.int16), blocks((32, 32, 32), [])
        cases.append((make_case(f"case_{number}", image, mask, []), image, mask))
    return write_store(path, cases)


class Organs:
    """The same with a map of organs: left half, right half; not in `case_0`, and `case_1` is a test case; of `case_2`
    only the right one was annotated."""

    semantic_classes = ("left", "right")

    def __init__(self, store: Store) -> None:
        self.store = store
        self.cases = {
            name: replace(
                case,
                has_semantic=name != "case_0",
                split="test" if name == "case_1" else "train",
                semantic_annotated=(1,) if name == "case_2" else None,
            )
            for name, case in store.cases.items()
        }

    def read(self, case_id: str, kind: str, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray:
        if kind == "semantic":
            organs = np.where(np.arange(40) < 20, 1, 2)[:, None, None].repeat(20, 1).repeat(20, 2)
            return organs[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
        return self.store.read(case_id, kind, start, stop)


def raw(case: object) -> Normalisation:
    return Normalisation((-math.inf,), (math.inf,), (0.0,), (1.0,))


def test_probe_patches_come_with_their_organs(tmp_path):
    store = Organs(organ_store(tmp_path))
    patches = ProbePatches(store, raw, (8, 16, 24), otherwise=["case_0"], number=12)  # longer than the volume in z
    assert patches.has_organs and len(patches) == 12 and len(set(patches.groups)) == 6
    assert {case.id for case in patches.cases} == {f"case_{number}" for number in range(2, 8)}  # no test case
    assert patches.known.tolist() == [[case.id != "case_2", True] for case in patches.cases]
    sides: set[int] = set()
    for index in range(12):
        image, places, organs = patches[index]
        assert image.shape == (1, 8, 16, 24) and image[..., 20:].eq(image[..., -1:]).all()  # padded behind the volume
        case = store.read(patches.cases[index].id, "image", (0, 0, 0), (40, 20, 20))[0]
        found = [
            x for x in range(33) for y in range(5)
            if np.array_equal(case[x : x + 8, y : y + 16], image[0, :, :, :20].numpy())
        ]  # fmt: skip
        assert len(found) == 1
        assert places.shape == (VOXELS, 3) and (places >= 0).all() and (places < (8, 16, 20)).all()
        assert organs.tolist() == [1 if found[0] + x < 20 else 2 for x in places[:, 0]]
        if 12 < found[0] < 20:  # both organs are there, and each is asked about
            assert sorted(organs[: VOXELS // 2]) == [1] * (VOXELS // 4) + [2] * (VOXELS // 4)
        sides |= set(organs)
        for again, once in zip(patches[index], (image, places, organs), strict=True):  # the same every time
            np.testing.assert_array_equal(np.asarray(again), np.asarray(once))
    assert sides == {1, 2}


def test_what_was_learned_is_not_asked_about(tmp_path):
    store = Organs(organ_store(tmp_path))
    learned = ["case_3", "case_4", "case_5"]
    patches = ProbePatches(store, raw, (8, 8, 8), otherwise=["case_0"], number=12, learned=learned)
    assert {case.id for case in patches.cases} == {"case_2", "case_6", "case_7"}


def test_without_organs_the_patches_are_those_of_the_validation_cases(tmp_path):
    store = organ_store(tmp_path)
    patches = ProbePatches(store, raw, (8, 8, 8), otherwise=["case_3", "case_5"], number=5)
    assert not patches.has_organs
    assert sorted(case.id for case in patches.cases) in (
        ["case_3"] * 3 + ["case_5"] * 2, ["case_3"] * 2 + ["case_5"] * 3,
    )  # fmt: skip
    assert not patches[0][2].any()


def test_features_are_those_of_the_cells_that_hold_the_voxels():
    strides = [(1, 1, 1), (2, 4, 2)]
    levels = [torch.randn(2, 3, 8, 8, 4), torch.randn(2, 5, 4, 2, 2)]
    places = torch.stack([torch.randint(size, (2, 6)) for size in (8, 8, 4)], dim=2)
    features = features_at(levels, strides, places)
    for b, v in np.ndindex(2, 6):
        x, y, z = places[b, v].tolist()
        expected = torch.cat([levels[0][b, :, x, y, z], levels[1][b, :, x // 2, y // 4, z // 2]])
        assert torch.equal(features[b, v], expected)


def test_voxels_are_asked_about_what_was_annotated(tmp_path):
    patches = ProbePatches(Organs(organ_store(tmp_path)), raw, (8, 8, 8), otherwise=[], number=6)
    organs = torch.tensor([[0, 1, 2]]).repeat(6, 1)
    features, present, known, groups = asked(torch.randn(6, 3, 4), organs, patches)
    assert features.shape == (18, 4) and groups.tolist() == [group for group in patches.groups for _ in range(3)]
    assert present.tolist() == [[False, False], [True, False], [False, True]] * 6
    of_all, right_only = [[True, True]] * 3, [[False, True], [False, False], [False, True]]
    assert known.tolist() == [
        row for case in patches.cases for row in (right_only if case.id == "case_2" else of_all)
    ]  # fmt: skip


TINY = [
    "data.pool=train", "data.patch_size=[32,32,16]", "data.batch_size=2", "data.num_workers=0", "data.intensity=null",
    "+data.num_val_patches=2", "backbone={name: resenc, channels: [4, 8], blocks: [1, 1], strides: [1, 2]}",
    "module.warmup_steps=0", "module.schedule=constant", "trainer.max_steps=4", "trainer.val_every_n_steps=4",
    "trainer.checkpoint_every_n_steps=4", "trainer.accelerator=cpu", "trainer.precision=32-true",
]  # fmt: skip
VIEWS = ["module.method.hidden=16", "module.method.embedding=8", "module.method.crop_size=16"]


class Attract(SimCLR):
    """What contrast guards against: views are only to look alike."""

    def forward(self, backbone, prepared):
        return {"embeddings": pooled_views(backbone, prepared["inputs"])}

    def loss(self, outputs, prepared):
        return {"loss": spread(outputs["embeddings"].flatten(0, 1))}


def run(config: str, folder: Path, name: str, *more: str) -> tuple[list[str], dict[str, str]]:
    """The warnings of a run about a collapse, and its last row of numbers."""
    line = ["fit", "--config", f"configs/pretrain/phantom_{config}.yaml", f"out={folder}", f"name={name}", *TINY]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main([*line, f"data.store={folder / 'store'}", *more]) == 0
    with open(folder / name / "metrics.csv", newline="") as file:
        row = list(csv.DictReader(file))[-1]
    return [str(entry.message) for entry in caught if "collapsed" in str(entry.message)], row


def test_a_collapsed_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(PRETRAINING, "attract", f"{__name__}:Attract")
    wavy_store(tmp_path / "store")
    method = "module.method={name: attract, crop_size: 16, pairs: 2, hidden: 16, embedding: 8}"
    steps = [
        "trainer.max_steps=30",
        "trainer.val_every_n_steps=30",
        "module.optimizer.lr=0.2",
        "module.views.intensity=false",
    ]
    texts, row = run("simclr", tmp_path, "collapsed", method, *steps)
    assert any("step 30: the features have collapsed" in text for text in texts)
    assert float(row["val/feature_std"]) < MIN_STD


class DeadEnd(ResEnc):
    """Whose coarsest level is the same for every image."""

    def forward(self, image, *others, **more):
        *fine, coarse = super().forward(image, *others, **more)
        return [*fine, 0.0 * coarse + 1.0]


def test_a_dead_level_beside_healthy_ones_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "dead_end", f"{__name__}:DeadEnd")
    wavy_store(tmp_path / "store")
    backbone = "backbone={name: dead_end, channels: [4, 8], blocks: [1, 1], strides: [1, 2]}"
    texts, row = run("mae", tmp_path, "dead", backbone, "trainer.max_steps=1", "trainer.val_every_n_steps=1")
    assert len(texts) == 1 and "step 1: the features of level 2 of 2 have collapsed" in texts[0]
    assert float(row["val/feature_std"]) > MIN_STD


@pytest.mark.parametrize("config", ["mae", "simclr"])
def test_a_healthy_run_does_not(config, tmp_path):
    wavy_store(tmp_path / "store")
    texts, row = run(config, tmp_path, "healthy", *(VIEWS if config == "simclr" else []))
    assert not texts
    assert float(row["val/feature_std"]) > 2 * MIN_STD and float(row["val/effective_rank"]) > 1.5
    assert "val/probe_auroc" not in row  # the store has no map of organs


@pytest.mark.slow
def test_organs_are_probed_every_few_validations(phantom_store, tmp_path):
    more = [f"data.store={phantom_store}", "trainer.probe_every_n_validations=2", "trainer.val_every_n_steps=1"]
    run("mae", tmp_path, "probed", *more)
    with open(tmp_path / "probed" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["val/feature_std"] for row in rows)
    assert [bool(row["val/probe_auroc"]) for row in rows] == [False, True, False, True]
    assert 0.4 < float(rows[-1]["val/probe_auroc"]) <= 1.0

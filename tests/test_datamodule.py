"""Who trains on which cases, in which order, on which process; and that a run continues where it stopped."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from tiny_store import blocks, image_of, make_case, tiny_store, write_store

from pretrain3d.config import UserError
from pretrain3d.data.batch import GlobalBatches
from pretrain3d.data.module import NO_CASE, DataModule


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("store")
    tiny_store(folder, num_train=10, num_pretrain=6)
    return str(folder)


def module_of(
    path: str, rank: int = 0, world_size: int = 1, step: int = 0, accumulate: int = 1, **settings
) -> DataModule:
    data = DataModule(path, **{"num_workers": 0, **settings})
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world_size,
        global_step=step,
        accumulate_grad_batches=accumulate,
        lightning_module=None,
    )
    return data


def indices(data: DataModule, count: int) -> list[list[int]]:
    return [raw["sample_index"] for raw in islice(iter(data.train_dataloader()), count)]


def test_pools_never_touch_test_or_validation_cases(path: str):
    labelled, unlabelled, both = (DataModule(path, pool=pool) for pool in ("train", "pretrain", "all"))
    assert len(labelled.train_ids) == 8 and len(labelled.val_ids) == 2 and labelled.test_ids == ["test_0"]
    assert len(unlabelled.train_ids) == 5 and len(unlabelled.val_ids) == 1
    assert set(both.train_ids) == {*labelled.train_ids, *unlabelled.train_ids}
    assert set(both.val_ids) == {*labelled.val_ids, *unlabelled.val_ids}
    for data in (labelled, unlabelled, both):
        assert not {*data.train_ids} & {*data.val_ids, "test_0"}
    folds = [set(DataModule(path, fold=fold).val_ids) for fold in range(5)]
    assert sum(map(len, folds)) == len(set.union(*folds)) == 10


def test_a_store_without_a_case_to_train_on_says_what_it_has(tmp_path: Path):
    mask, image = np.zeros((16, 16, 16), np.uint8), np.zeros((1, 16, 16, 16), np.float32)
    write_store(tmp_path, [(make_case(split, image, mask, [], split), image, mask) for split in ("val", "test")])
    with pytest.raises(UserError, match=r"has no case left to train on; it has val and test cases only$"):
        DataModule(str(tmp_path))


@pytest.mark.parametrize(("pool", "there", "sizes"), [("pretrain", "train", (6, 0)), ("train", "pretrain", (0, 4))])
def test_an_empty_pool_names_the_other_one(tmp_path: Path, pool: str, there: str, sizes: tuple[int, int]):
    tiny_store(tmp_path, *sizes)
    text = rf"data\.pool={pool}: .* has no case left to train on; its cases are {there}: data\.pool={there}$"
    with pytest.raises(UserError, match=text):
        DataModule(str(tmp_path), pool=pool)


def test_a_detector_needs_annotated_cases(path: str):
    for pool in ("train", "all", "pretrain"):
        data = module_of(path, pool=pool)
        data.setup("fit")
        data.trainer.lightning_module = SimpleNamespace(detector="retina")  # type: ignore[union-attr]
        data.setup("validate")
        if pool != "pretrain":
            data.setup("fit")
            continue
        with pytest.raises(UserError, match=r"data\.pool=pretrain: none of the 5 training cases is annotated"):
            data.setup("fit")


def test_annotated_cases_without_objects_have_an_empty_mask(tmp_path: Path):
    shape = (40, 36, 30)
    cases = [
        (make_case(f"c{n}", image_of(shape, n), blocks(shape, []), []), image_of(shape, n), blocks(shape, []))
        for n in range(5)
    ]
    write_store(tmp_path, cases)
    data = module_of(str(tmp_path))
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch["mask"].shape == (2, 16, 16, 16) and not batch["mask"].any()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"seed": -1}, "^seed=-1: at least 0"),
        ({"augment": {"spatial": "maybe"}}, "augment.spatial=maybe: expected true, false or"),
        ({"augment": {"intensity": 3}}, "augment.intensity=3: expected true, false or"),
        ({"augment": {"spatial": {"rotation_degrees": "x"}}}, "augment.spatial.rotation_degrees=x: expected an angle"),
    ],
)
def test_a_senseless_setting_is_one_line(path: str, settings: dict[str, Any], text: str):
    with pytest.raises(UserError, match=text):
        DataModule(path, **settings)


def test_label_fractions_are_nested_and_belong_to_the_seed(path: str):
    kept = [set(DataModule(path, label_fraction=share).train_ids) for share in (0.1, 0.25, 0.5, 1.0)]
    assert [len(ids) for ids in kept] == [1, 2, 4, 8]
    assert kept[0] < kept[1] < kept[2] < kept[3]
    assert len({tuple(DataModule(path, label_fraction=0.5, seed=seed).train_ids) for seed in range(5)}) > 1
    assert len({tuple(DataModule(path, label_fraction=0.5, seed=seed).val_ids) for seed in range(5)}) == 1


def test_unlabelled_cases_are_held_out_by_group(tmp_path: Path):
    cases = []
    for number in range(12):
        image, mask = image_of((16, 16, 16), number), blocks((16, 16, 16), [])
        case = make_case(f"p{number:02}", image, mask, [], "pretrain", f"patient {number // 3}", (), False)
        cases.append((case, image, mask))
    write_store(tmp_path, cases)
    data = DataModule(str(tmp_path), pool="pretrain", intensity={"scheme": "zscore"})
    groups = [{int(name[1:]) // 3 for name in ids} for ids in (data.train_ids, data.val_ids)]
    assert len(groups[1]) == 1 and not groups[0] & groups[1]


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_samples_of_one(path: str, world_size: int):
    alone = indices(module_of(path, batch_size=2 * world_size, step=4), 3)
    shares = [indices(module_of(path, rank, world_size, step=4, batch_size=2), 3) for rank in range(world_size)]
    for step, whole in enumerate(alone):
        assert all(share[step] == whole[rank::world_size] for rank, share in enumerate(shares))
    assert alone[0][0] == 4 * 2 * world_size


def test_a_run_continues_at_the_samples_it_has_not_seen(path: str):
    assert indices(module_of(path, step=3, accumulate=4, batch_size=2), 1) == [[24, 25]]
    with pytest.raises(TypeError):
        len(module_of(path).train_dataloader())
    assert next(iter(GlobalBatches(first=6, batch_size=3, rank=1, world_size=2))) == [7, 9, 11]


def test_samples_do_not_depend_on_the_number_of_workers(path: str):
    def batches(num_workers: int) -> list[dict[str, Any]]:
        data = module_of(path, num_workers=num_workers, batch_size=3)
        return [data.on_after_batch_transfer(raw, 0) for raw in islice(iter(data.train_dataloader()), 4)]

    for first, second in zip(batches(0), batches(2), strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert torch.equal(value, second[key]) if torch.is_tensor(value) else value == second[key]


def test_another_seed_gives_other_samples(path: str):
    one, two = (module_of(path, seed=seed).train_dataloader() for seed in (0, 1))
    assert not torch.equal(next(iter(one))["image"][0], next(iter(two))["image"][0])


def test_validation_patches_are_fixed_and_each_on_one_process(path: str):
    def patches(rank: int = 0, world_size: int = 1, **settings) -> dict[int, torch.Tensor]:
        data = module_of(path, rank, world_size, pool="pretrain", validation="patches", num_val_patches=5, **settings)
        batches = [data.on_after_batch_transfer(raw, 0) for raw in data.val_dataloader()]
        assert {name for batch in batches for name in batch["case_ids"]} <= set(data.val_ids)
        return {
            index: image
            for batch in batches
            for index, image in zip(batch["sample_index"], batch["image"], strict=True)
        }

    reference = patches()
    assert sorted(reference) == [0, 1, 2, 3, 4]
    for other in (patches(seed=5, augment=False), patches(0, 2) | patches(1, 2)):
        assert sorted(other) == sorted(reference)
        assert all(torch.equal(other[index], image) for index, image in reference.items())
    assert sorted(patches(1, 2)) == [1, 3]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_case_is_predicted_by_one_process(path: str, world_size: int):
    seen: Counter[str] = Counter()
    for rank in range(world_size):  # with more processes than cases some see no case
        data = module_of(path, rank, world_size)
        batches = list(data.val_dataloader())
        assert all(data.on_after_batch_transfer(batch, 0) is batch for batch in batches)
        assert batches  # Lightning wants something of each
        seen.update(batch["case_id"] for batch in batches)
    assert seen.pop(NO_CASE, 0) == max(world_size - len(DataModule(path).val_ids), 0)
    assert seen == Counter(DataModule(path).val_ids)
    assert DataModule(path).test_ids == ["test_0"]


def test_volume_is_normalised_and_so_is_its_padding(path: str):
    data = DataModule(path, intensity={"scheme": "window", "low": -100.0, "high": 100.0, "mean": 20.0, "std": 40.0})
    image, case = data.volume("train_3")
    assert image.dtype == torch.float32 and case is data.store.cases["train_3"]
    assert np.allclose(image, (np.clip(image_of(case.shape, 3), -100, 100) - 20.0) / 40, atol=1e-6)
    assert data.pad_value("train_3") == (-3.0,)
    assert data.classes == ["nodule", "lesion"] and data.in_channels == 1 and data.patch_size == (16, 16, 16)


def test_patches_and_volumes_are_normalised_alike(path: str):
    data = module_of(path, patch_size=[58, 36, 30], pool="train", augment=False, foreground=0.0, batch_size=1)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    volume, _ = data.volume(batch["case_ids"][0])
    assert torch.equal(batch["image"][0, 0][batch["inside"][0, 0]].view(volume.shape[1:]), volume[0])


def test_mistakes_are_named(path: str):
    for settings, message in [
        ({"patch_size": [16, 16]}, r"patch_size=\[16, 16\]"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"label_fraction": 0.0}, r"label_fraction=0\.0"),
        ({"augment": {"mixup": True}}, "no 'mixup'"),
        ({"intensity": "pretrained"}, "intensity=pretrained"),
        ({"fold": 5}, "fold"),
        ({"seed": -1}, "seed=-1"),
        ({"num_workers": -1}, "num_workers=-1"),
    ]:
        with pytest.raises(UserError, match=message):
            DataModule(path, **settings)


def test_a_store_without_unlabelled_cases_cannot_pretrain(tmp_path: Path):
    tiny_store(tmp_path, num_train=5, num_pretrain=0)
    with pytest.raises(UserError, match="pool=pretrain"):
        DataModule(str(tmp_path), pool="pretrain")


def test_pretraining_on_unlabelled_cases_needs_no_folds(tmp_path: Path):
    tiny_store(tmp_path, num_train=1, num_pretrain=4)
    data = DataModule(str(tmp_path), pool="pretrain", intensity={"scheme": "ct"})
    assert len(data.train_ids) == 3 and len(data.val_ids) == 1 and data.test_ids == ["test_0"]
    with pytest.raises(UserError, match="1 training patients cannot fill 5 folds"):
        DataModule(str(tmp_path), pool="all")


class Recorder(lightning.LightningModule):
    """Notes which samples come, and trains one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []
        self.cases: list[str] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["sample_index"])
        return (self.weight - batch["image"].mean()).square().sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.cases.append(batch["case_id"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_trains_validates_and_resumes_in_the_middle(path: str, tmp_path: Path):
    def fit(max_steps: int, checkpoint: str | None = None) -> tuple[Recorder, lightning.Trainer]:
        trainer = lightning.Trainer(
            max_steps=max_steps, max_epochs=-1, val_check_interval=4, check_val_every_n_epoch=None,
            accumulate_grad_batches=2, use_distributed_sampler=False, num_sanity_val_steps=0, accelerator="cpu",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        module, data = Recorder(), DataModule(path, num_workers=0, batch_size=2)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        return module, trainer

    whole, _ = fit(5)
    assert whole.seen == [[2 * i, 2 * i + 1] for i in range(10)]
    assert whole.cases == DataModule(path).val_ids * 2
    part, trainer = fit(3)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    rest, _ = fit(5, str(tmp_path / "part.ckpt"))
    assert part.seen + rest.seen == whole.seen
    assert torch.equal(rest.weight, whole.weight)

"""A run killed at any moment goes on as if nothing had happened; pictures, speed and progress without epochs."""

import json
import os
import re
import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from pretrain3d.config import UserError
from pretrain3d.reporting import callbacks, checkpoints, throughput
from pretrain3d.reporting.callbacks import Pictures, Progress, as_images
from pretrain3d.reporting.checkpoints import Checkpoints
from pretrain3d.reporting.csv_logger import MetricsCSV
from pretrain3d.reporting.results import read_rows
from pretrain3d.reporting.throughput import Throughput

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
ACCUMULATE, STEPS, VALIDATE = 2, 12, 4


class Endless(IterableDataset):
    """Batches as a function of their index, from the one that a run resumes at."""

    def __init__(self, trainer):
        self.trainer = trainer

    def __iter__(self):
        for index in count(self.trainer.global_step * ACCUMULATE):
            yield {"image": torch.randn(2, 3, generator=torch.Generator().manual_seed(index))}


class Tiny(lightning.LightningModule):
    """A linear layer whose validation swaps its weights out and in again, as averaging may do."""

    def __init__(self, scores=None):
        super().__init__()
        self.net = torch.nn.Linear(3, 1)
        torch.nn.init.constant_(self.net.weight, 0.5)
        torch.nn.init.constant_(self.net.bias, 0.0)
        self.scores = scores
        self.validated = []

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch["image"]) - 1).square().mean()
        self.log("train/loss", loss)
        return loss

    def on_validation_start(self):
        self.kept = self.net.weight.detach().clone()
        self.net.weight.data.zero_()

    def on_validation_end(self):
        self.net.weight.data.copy_(self.kept)

    def validation_step(self, batch, batch_idx):
        step = self.global_step
        if batch_idx == 0:
            self.validated.append(step)
        self.log("val/mAP", float(self.scores[step]) if self.scores else float(self.kept.sum()))
        return {"pictures": {"original": np.full((4, 6), step, np.float32)}}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(folder: Path, *extra: Callback, module=None, steps=STEPS, resume=False, every=3, monitor="val/mAP",
        log_every=1):  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    module = module or Tiny()
    trainer = lightning.Trainer(
        max_steps=steps, max_epochs=-1, val_check_interval=VALIDATE * ACCUMULATE, check_val_every_n_epoch=None,
        accumulate_grad_batches=ACCUMULATE, log_every_n_steps=log_every, accelerator="cpu",
        num_sanity_val_steps=1, enable_model_summary=False, 
        enable_progress_bar=any(isinstance(c, Progress) for c in extra),
        logger=[MetricsCSV(folder)], callbacks=[Checkpoints(folder, every, monitor), *extra],
    )  # fmt: skip
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(
        module,
        DataLoader(Endless(trainer), batch_size=None),
        DataLoader([{"image": torch.zeros(1, 3)}] * 2, batch_size=None),
        ckpt_path=str(last) if resume and last.exists() else None,
        weights_only=True,
    )
    return module, trainer


def state_of(folder):
    state = json.loads((folder / "state.json").read_text())
    assert state.keys() == {"status", "step", "seconds", "device"}
    return state["status"], state["step"]


class Snapshots(Callback):
    """Copies the run folder as it is at every hook and around every renaming: what a kill at that moment leaves."""

    def __init__(self, run: Path, copies: Path, monkeypatch):
        self.run, self.copies, self.names = run, copies, []
        replace = os.replace

        def spied(source, target):
            self.take(f"before-{Path(target).name}")
            replace(source, target)
            self.take(f"after-{Path(target).name}")

        monkeypatch.setattr(os, "replace", spied)

    def take(self, moment):
        name = f"{len(self.names):03d}-{moment}"
        shutil.copytree(self.run, self.copies / name)
        self.names.append(name)

    def on_train_batch_end(self, *_):
        self.take("train_batch_end")

    def on_validation_start(self, *_):
        self.take("validation_start")

    def on_validation_end(self, *_):
        self.take("validation_end")


def test_resuming_from_any_moment_repeats_the_run_exactly(tmp_path, monkeypatch):
    run, copies = tmp_path / "run", tmp_path / "copies"
    copies.mkdir()
    spy = Snapshots(run, copies, monkeypatch)
    module, _ = fit(run, spy)
    monkeypatch.undo()
    metrics = (run / "metrics.csv").read_text()
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)

    states = {}  # one resume for each state of the files that differs in what a resume reads
    for name in spy.names:
        files = [
            copies / name / "metrics.csv",
            copies / name / "checkpoints" / "last.ckpt",
            copies / name / "state.json",
        ]
        key = tuple(hash(file.read_bytes()) if file.exists() else None for file in files)
        states.setdefault(key, name)
    assert len(states) > 12
    for name in list(states.values()):
        again, trainer = fit(copies / name, resume=True)
        assert trainer.global_step == STEPS, name
        assert torch.equal(again.net.weight, module.net.weight) and torch.equal(again.net.bias, module.net.bias), name
        assert (copies / name / "metrics.csv").read_text() == metrics, name
        assert state_of(copies / name) == ("finished", STEPS), name
        rebest = torch.load(copies / name / "checkpoints" / "best.ckpt", weights_only=True)
        assert rebest["global_step"] == best["global_step"], name
        assert torch.equal(rebest["state_dict"]["net.weight"], best["state_dict"]["net.weight"]), name
        assert not list((copies / name).rglob("*.tmp")), name


def test_a_step_is_saved_after_its_validation_and_that_is_not_repeated(tmp_path):
    scores = {0: 0.9, 4: 0.1, 8: 0.5, 12: 0.5}
    module, _ = fit(tmp_path, module=Tiny(scores), steps=8, every=100)
    assert module.validated == [0, 4, 8]  # 0: the sanity check
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert torch.equal(last["state_dict"]["net.weight"], module.net.weight)  # not the weights it validates with
    assert last["global_step"] == 8
    again, _ = fit(tmp_path, module=Tiny(scores), steps=12, every=100, resume=True)  # max_steps may grow
    assert again.validated == [12]
    assert [int(row["step"]) for row in read_rows(tmp_path / "metrics.csv")] == list(range(1, 13))
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 8  # equal at 12: the earlier stays


def test_metrics_rows_count_optimiser_steps(tmp_path):
    fit(tmp_path)
    rows = read_rows(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert [int(row["step"]) for row in rows if "val/mAP" in row] == [4, 8, 12]
    assert "epoch" not in rows[0]


def test_a_run_stopped_early_is_not_finished(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 5

    fit(tmp_path, Stop())
    assert state_of(tmp_path) == ("running", 5)


def test_a_monitor_that_nobody_logs_is_named(tmp_path):
    with pytest.raises(UserError, match=r"val/loss, which is not logged; logged: .*val/mAP"):
        fit(tmp_path, monitor="val/loss")


def test_pictures_keep_the_first_and_the_last(tmp_path):
    fit(tmp_path, Pictures(tmp_path))
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["step0000004_original.png", "step0000012_original.png"]


def test_pictures_share_the_window_of_the_first():
    ramp = np.linspace(-1, 1, 4000, dtype=np.float32).reshape(40, 100)
    images = as_images({"original": ramp, "darker": ramp - 1, "colours": np.ones((2, 3, 3), np.float32)})
    original, darker = np.asarray(images["original"], np.float64), np.asarray(images["darker"], np.float64)
    assert original.shape == (100, 40)  # columns along X, rows along Y
    assert original[-1, -1] == 0 and original[0, 0] == 255  # the origin (left, back) is at the right bottom
    assert abs(darker[0, 0] - 127.5) < 3  # 0 lies in the middle of [-1, 1]
    assert np.asarray(images["colours"]).tolist() == np.full((2, 3, 3), 255).tolist()
    assert isinstance(images["original"], Image.Image)


def tick(monkeypatch, seconds=1):
    """Every look of the callbacks at the clock is so many seconds later."""
    clock = count(step=seconds)
    for watched in (callbacks, checkpoints, throughput):
        monkeypatch.setattr(watched, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))


def test_throughput_counts_patches_and_remaining_time(tmp_path, monkeypatch):
    tick(monkeypatch)
    fit(tmp_path, Throughput(), steps=5)
    rows = {int(row["step"]): row for row in read_rows(tmp_path / "metrics.csv")}
    assert all("perf/patches_per_second" not in rows[step] for step in (1, 2))  # warming up
    patches_per_step = 2 * ACCUMULATE
    assert all(0 < float(rows[step]["perf/patches_per_second"]) <= patches_per_step for step in (3, 4, 5))
    assert float(rows[3]["perf/samples_seen"]) == 3 * patches_per_step
    assert float(rows[3]["perf/seconds_left"]) > float(rows[5]["perf/seconds_left"]) == 0.0
    assert not {"perf/tflop_per_second", "perf/memory_gib", "perf/mfu"} & rows[4].keys()  # nothing is known of them


@pytest.mark.parametrize(("gpu", "known"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA Something", False)])
def test_throughput_says_what_is_used_of_a_gpu(tmp_path, monkeypatch, gpu, known):
    tick(monkeypatch)
    resets = []
    monkeypatch.setattr(throughput, "_on_gpu", lambda trainer: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    module = Tiny()
    module.flop_per_sample = 5e12
    fit(tmp_path, Throughput(), module=module, steps=4)
    rows = {int(row["step"]): row for row in read_rows(tmp_path / "metrics.csv")}
    assert len(resets) == 1
    assert float(rows[3]["perf/memory_gib"]) == 3.0
    tflop = float(rows[3]["perf/tflop_per_second"])
    assert tflop == pytest.approx(5 * float(rows[3]["perf/patches_per_second"]))
    assert ("perf/mfu" in rows[3]) == known
    if known:
        assert float(rows[3]["perf/mfu"]) == pytest.approx(tflop / (989.4 / 2))  # full precision: TF32


def test_progress_writes_lines_into_a_file(tmp_path, capsys):
    fit(tmp_path, Progress("demo", lines=3))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("demo:")]
    assert [line.split(" ")[1] for line in lines] == ["4/12", "8/12", "12/12"]


def test_progress_of_a_run_without_an_end_is_a_line_a_minute(tmp_path, capsys, monkeypatch):
    tick(monkeypatch, 10)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 7

    fit(tmp_path, Stop(), Progress("demo"), steps=-1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("demo:")]
    assert 1 < len(lines) < 7 and all(re.match(r"demo: \d \[\d\d:\d\d\] ", line) for line in lines)


def test_progress_bar_counts_steps_of_the_whole_run(tmp_path, monkeypatch):
    seen = []

    class Spy(Callback):
        def on_train_batch_end(self, trainer, *_):
            bar = trainer.progress_bar_callback.train_progress_bar
            seen.append((trainer.global_step, bar.n, bar.total))

    fit(tmp_path, steps=8)
    bar = Progress()
    bar._terminal, bar._refresh_rate = True, 1
    fit(tmp_path, bar, Spy(), resume=True)
    assert seen[-1] == (12, 12, 12) and {total for _, _, total in seen} == {12}


def test_progress_bar_looks_at_the_loss_only_where_it_is_logged(tmp_path, monkeypatch):
    seen, real = [], Progress.get_metrics
    monkeypatch.setattr(
        Progress,
        "get_metrics",
        lambda self, trainer, module: seen.append(trainer.global_step) or real(self, trainer, module),
    )
    bar = Progress()
    bar._terminal, bar._refresh_rate = True, 1
    fit(tmp_path, bar, steps=8, log_every=3, module=Tiny())
    assert set(seen) - {0, 4, 8} == {3, 6}  # Lightning shows a validation's numbers at 4 and 8


def test_training_time_adds_up_over_sessions(tmp_path, monkeypatch):
    tick(monkeypatch)
    fit(tmp_path, steps=8, every=100)  # looks: start, the saves after the validations at 4 and 8
    assert json.loads((tmp_path / "state.json").read_text())["seconds"] == 2.0
    fit(tmp_path, steps=12, every=100, resume=True)
    assert json.loads((tmp_path / "state.json").read_text())["seconds"] == 3.0


def test_lightning_writes_no_checkpoints_of_its_own(tmp_path):
    _, trainer = fit(tmp_path)
    assert [type(callback) for callback in trainer.checkpoint_callbacks] == [Checkpoints]
    assert sorted(path.name for path in tmp_path.rglob("*.ckpt")) == ["best.ckpt", "last.ckpt"]

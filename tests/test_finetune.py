"""Fine-tuning schedules: who learns when, how fast, with how much memory; averages; the same on two processes."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.modules import FINETUNE
from pretrain3d.modules.averaging import Average, StochasticAveraging
from pretrain3d.modules.base import BaseModule
from pretrain3d.modules.finetune import Timetable
from pretrain3d.modules.wrapping import wrap_anew
from pretrain3d.registry import build


def timetable(max_steps: int, warmup_steps: int = 0, schedule: str = "poly", **node: Any) -> Timetable:
    return build(FINETUNE, node, "module.finetune", schedule=schedule, warmup_steps=warmup_steps, max_steps=max_steps)


def rates(table: Timetable, network: str, steps: int) -> list[float]:
    return [table.factor(network, step) for step in range(steps)]


def test_two_phases() -> None:
    table = timetable(10, warmup_steps=1, schedule="constant", name="two_phase", head_steps=3, head_lr=2.0)
    assert rates(table, "detector", 6) == pytest.approx([0.5, 1.0, 1.5, 0.5, 1.0, 1.0])
    assert rates(table, "backbone.2", 6) == pytest.approx([0, 0, 0, 0.5, 1.0, 1.0])


def test_sawtooth() -> None:
    table = timetable(1000, warmup_steps=50, name="sawtooth", head_warmup_steps=25, head_decay_steps=25)
    head, backbone = rates(table, "head", 1001), rates(table, "backbone", 1001)
    assert head[24] == pytest.approx(25 / 26) and head[25] == 1.0 and head[49] == pytest.approx((1 / 25) ** 0.9)
    assert backbone[:50] == [0.0] * 50 and backbone[50:] == head[50:]
    assert head[50] == pytest.approx(1 / 51) and head[100] == 1.0
    assert head[550] == pytest.approx((450 / 900) ** 0.9) and head[1000] == 0.0


def test_whole_and_frozen_share_their_course() -> None:
    whole, frozen = (timetable(20, warmup_steps=4, name=name) for name in ("whole", "frozen"))
    assert rates(whole, "backbone", 20) == rates(whole, "head", 20) == rates(frozen, "head", 20)
    assert set(rates(frozen, "backbone", 20)) == {0.0}
    cycled = frozen.then(10, lambda step: 0.5)  # as with cycles of SWA
    assert [phase.frozen for phase in cycled.phases] == [True, True] and set(rates(cycled, "backbone", 20)) == {0.0}
    assert rates(cycled, "head", 20) == [*rates(frozen, "head", 10), *[0.5] * 10]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "two_phase", "head_steps": 0}, "head_steps is 0; two_phase needs at least 1"),
        ({"name": "two_phase", "head_steps": 9}, r"head_steps=9 and module.warmup_steps=1 leave nothing of 10 steps"),
        ({"name": "two_phase", "head_steps": 2, "head_lr": 0.0}, "head_lr is 0.0; it is a factor above 0"),
        ({"name": "sawtooth", "head_warmup_steps": 5, "head_decay_steps": 4}, "leave nothing of 10 steps"),
        ({"name": "whole", "layer_decay": 1.5}, "layer_decay is 1.5; it is above 0 and at most 1"),
        ({"name": "whole", "backbone_lr": 0.0}, "backbone_lr is 0.0; it is a factor above 0 .name: frozen"),
        ({"name": "two_phase"}, "argument 'head_steps' is missing"),
        ({"name": "two_fase"}, "unknown module.finetune 'two_fase', did you mean 'two_phase'"),
        ({"name": "frozen", "layer_decay": 0.5}, "unknown argument 'layer_decay'"),
    ],
)
def test_mistakes(node: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        timetable(10, warmup_steps=1, **node)


class Net(nn.Module):
    """With running statistics and dropout, so that its mode shows."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.fixed = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.stages[1](self.stages[0](x)))) * self.fixed


class Tiny(BaseModule):
    """A regression, watched: what each step's features and parameters were like."""

    def __init__(self, finetune: dict[str, Any] | None = None, **settings: Any) -> None:
        settings = {"schedule": "constant", "optimizer": {"name": "sgd", "lr": 0.1}} | settings
        super().__init__(Net(), nn.Linear(4, 1), "head", {"seed": 0, "source": {}}, finetune=finetune, **settings)
        self.head: Any
        self.seen: list[dict[str, Any]] = []
        self.history: list[Tensor] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        features = self.backbone(batch["image"])
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        self.seen.append(
            {"graph": features.requires_grad, "training": self.backbone.norm.training,  # type: ignore[union-attr]
             "statistics": self.backbone.norm.running_mean.clone(),  # type: ignore[union-attr, operator]
             "weights": self.backbone.stages[0].weight.detach().clone(), "memory": len(optimizer.state),
             "flop": self.flop_per_sample, "draw": float(torch.rand(()))}
        )  # fmt: skip
        return self.finish_losses({"loss": (self.head(features) - 1).square().mean()}, batch, "train")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.history.append(self.head.weight.detach().clone())


def batches() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randn(4, 4, generator=generator), "sample_index": [4 * i], "case_ids": ["a"]} for i in range(12)
    ]


def train(module: Tiny, steps: int, folder: Path, resume: Path | None = None, **settings: Any) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, default_root_dir=folder, **settings,
    )  # fmt: skip
    loader: Any = torch.utils.data.DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=None if resume is None else str(resume))
    return trainer


class StopAt(lightning.Callback):
    """The run is killed after some steps; its schedule is that of the whole run."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.global_step == self.steps


def test_a_gpu_is_idle_while_it_is_wrapped_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends weights on a side stream: they must be neither behind the last step nor ahead of the next."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(str(device)))
    strategy = DDPStrategy()
    monkeypatch.setattr(strategy, "configure_ddp", lambda: calls.append("wrapped"))
    module: Any = Tiny({"name": "frozen"})
    module._trainer, module._device = SimpleNamespace(strategy=strategy), torch.device("cuda", 1)
    wrap_anew(module, "this")
    assert calls == ["cuda:1", "wrapped", "cuda:1"] and strategy.model is module


def test_a_frozen_backbone_computes_nothing_and_thaws(tmp_path: Path) -> None:
    module = Tiny({"name": "two_phase", "head_steps": 3})
    trainer = train(module, 6, tmp_path)
    first, second = module.seen[:3], module.seen[3:]
    assert not any(seen["graph"] or seen["training"] for seen in first)
    assert all(seen["graph"] and seen["training"] for seen in second)
    assert all(torch.equal(seen["weights"], first[0]["weights"]) for seen in [*first, second[0]])
    assert all(torch.equal(seen["statistics"], first[0]["statistics"]) for seen in first)
    assert not torch.equal(second[1]["weights"], first[0]["weights"])
    assert [seen["memory"] for seen in module.seen] == [0, 2, 2, 0, 8, 8]  # the head's; all anew from step 3
    assert not module.backbone.fixed.requires_grad
    flop = [seen["flop"] for seen in module.seen]
    assert flop[0] is flop[3] is None and flop[1] == flop[2] < flop[4] == flop[5], "counted anew when it thaws"
    assert trainer.callback_metrics["lr/head"] == trainer.callback_metrics["lr/backbone"] == pytest.approx(0.1)


def test_draws_are_those_of_the_step_and_not_of_what_was_drawn_before(tmp_path: Path) -> None:
    draws = []
    for seed in (1, 2):
        module = Tiny()
        torch.manual_seed(seed)
        train(module, 4, tmp_path)
        draws.append([seen["draw"] for seen in module.seen])
    assert draws[0] == draws[1] and len(set(draws[0])) == 4


def test_a_module_may_be_trained_twice(tmp_path: Path) -> None:
    module = Tiny({"name": "two_phase", "head_steps": 3})
    train(module, 5, tmp_path, callbacks=[StopAt(2)])
    assert module._frozen, "it was stopped while the backbone was frozen"
    train(module, 5, tmp_path)
    assert [seen["memory"] for seen in module.seen] == [0, 2, 0, 2, 2, 0, 8]


def test_a_probe_leaves_the_backbone_alone(tmp_path: Path) -> None:
    module = Tiny({"name": "frozen"})
    before = {key: value.clone() for key, value in module.backbone.state_dict().items()}
    trainer = train(module, 4, tmp_path, accumulate_grad_batches=2)
    assert all(torch.equal(value, before[key]) for key, value in module.backbone.state_dict().items())
    assert trainer.callback_metrics["lr/backbone"] == 0 and not torch.equal(module.history[0], module.history[-1])


@pytest.mark.parametrize("stop", [2, 3, 5])  # within the first phase, between the two, within the second
def test_resumed_anywhere_it_ends_the_same(stop: int, tmp_path: Path) -> None:
    def fresh() -> Tiny:
        torch.manual_seed(1)
        return Tiny(
            {"name": "two_phase", "head_steps": 3},
            optimizer={"name": "adamw", "lr": 0.1},
            swa={"start_step": 4, "every_n_steps": 2, "lr": [1.0, 0.1]},
        )

    whole = fresh()
    train(whole, 8, tmp_path)
    killed = fresh()
    trainer = train(killed, 8, tmp_path, callbacks=[StopAt(stop)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = fresh()
    # the loader of this test starts again, so that of the killed run is cut to what it had not seen
    rest = batches()[stop:]
    again = lightning.Trainer(
        max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress["current"] = dict.fromkeys(progress["current"], 0)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    again.fit(resumed, torch.utils.data.DataLoader(rest, batch_size=None), ckpt_path=tmp_path / "last.ckpt")  # type: ignore[arg-type]
    assert again.global_step == 8
    different = [key for key, value in whole.state_dict().items() if not torch.equal(value, resumed.state_dict()[key])]
    assert not different


def test_swa_is_the_mean_of_its_snapshots(tmp_path: Path) -> None:
    module = Tiny(swa={"start_step": 2, "every_n_steps": 3, "lr": [0.5, 0.1]})
    assert not module.has_average() and module.best_networks()[1] is module.head
    trainer = train(module, 9, tmp_path)
    mean = (module.history[4] + module.history[7]) / 2  # after steps 5 and 8
    torch.testing.assert_close(module.averaged.head.weight, mean)  # type: ignore[union-attr]
    assert module.best_networks()[1] is module.averaged.head  # type: ignore[union-attr]
    table = module._timetable
    assert table is not None
    assert rates(table, "head", 9) == pytest.approx([1, 1, 0.5, 0.3, 0.1, 0.5, 0.3, 0.1, 0.5])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["pretrain3d"]["weights"] == "swa"


def test_swa_without_cycles_leaves_the_schedule(tmp_path: Path) -> None:
    module = Tiny(swa={"start_step": 2, "every_n_steps": 1}, schedule="poly")
    train(module, 4, tmp_path)
    assert module._timetable is not None and len(module._timetable.phases) == 1
    assert int(module.averaged.updates) == 2  # type: ignore[union-attr]


def test_mistakes_of_averages(tmp_path: Path) -> None:
    for swa, message in (
        ({"start_step": 2, "every_n_steps": 9}, "start_step . every_n_steps = 11 steps, beyond trainer.max_steps=4"),
        ({"start_step": 0, "every_n_steps": 9}, "module.swa.start_step is 0; expected at least 1"),
        ({"start_step": 1, "every_n_steps": 1, "lr": [0.1, 0.2]}, r"module.swa.lr is \[0.1, 0.2\]; expected two"),
        ({"start_step": 1}, "module.swa: argument 'every_n_steps' is missing"),
    ):
        with pytest.raises(UserError, match=message):
            train(Tiny(swa=swa), 4, tmp_path)
    with pytest.raises(UserError, match=r"module\.ema=0\.9 and module\.swa exclude each other"):
        Tiny(swa={"start_step": 1, "every_n_steps": 1}, ema=0.9)


def test_equal_weights_without_decay() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = Average({"net": network}, decay=None)
    for value in (1.0, 2.0, 6.0):
        network.weight.data.fill_(value)
        average.update({"net": network})
    assert float(average.net.weight) == pytest.approx(3.0)  # type: ignore[union-attr]
    assert StochasticAveraging(4, 3).due(7) and not StochasticAveraging(4, 3).due(4)


COMMON = [
    "data.patch_size=[32,32,32]", "data.num_workers=0", "trainer.max_steps=8", "module.warmup_steps=1",
    "trainer.val_every_n_steps=8", "trainer.checkpoint_every_n_steps=8", "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu", "trainer.precision=32-true", "seed=3", "module.ema=null", "module.overlap=0",
    "module.optimizer=sgd", "+module.optimizer.lr=2.0e-5", "module.schedule=constant",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["two_phase", "frozen"])
def test_two_processes_with_a_frozen_backbone_equal_one(schedule: str, phantom_store: Path, tmp_path: Path) -> None:
    """Without the new wrapper the backbone would not be reduced once it is freed, or the first step would wait."""
    node = {"two_phase": "{name: two_phase, head_steps: 3}", "frozen": "{name: frozen}"}[schedule]
    outcomes = {}
    ddp = ["data.batch_size=2", "trainer.devices=2", "trainer.strategy=ddp"]
    for name, more in (("one", ["data.batch_size=4"]), ("two", ddp)):
        line = [
            sys.executable, "-m", "pretrain3d", "fit", "--config", "configs/detect/phantom.yaml", f"name={name}",
            f"out={tmp_path}", f"data.store={phantom_store}", f"module.finetune={node}", *COMMON, *more,
        ]  # fmt: skip
        done = subprocess.run(line, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        with open(tmp_path / name / "metrics.csv", newline="") as file:
            losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
        weights = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        outcomes[name] = losses, weights
    (one, weights_one), (two, weights_two) = outcomes["one"], outcomes["two"]
    assert len(one) == 8 and two == pytest.approx(one, rel=1e-5, abs=1e-5)
    weights_two["detector.normaliser.mean"] *= 2  # positives per process
    for key, value in weights_one.items():
        torch.testing.assert_close(weights_two[key], value, rtol=1e-5, atol=1e-6, msg=key)
        if key.startswith("backbone.") and key.endswith("norm.bias"):  # starts at 0, so that it is what was learned
            assert (float(value.abs().max()) > 0) == (schedule == "two_phase"), key
            assert float((weights_two[key] - value).abs().max()) <= 0.05 * float(value.abs().max()), key

"""Fine-tuning schedules: which part of the network learns when, and how fast.

A run is a row of phases. In the first ones the backbone may be frozen: its parameters require no gradient, so none is
computed and nothing is kept for it, and it stays in evaluation mode, so that norms with running statistics and
stochastic depth do what they do at prediction. (nnssl only leaves it out of the optimiser, and computes its gradients
all the same.)

| name | published as | phases |
|---|---|---|
| `whole` | nnDetection-finetuning's recommendation; nnssl `PretrainedTrainer` | ramp, then `module.schedule` |
| `two_phase` | nnDetection-finetuning `..._warmupdecoder_heads` | neck and heads ramp; whole net ramps, then decays |
| `sawtooth` | nnssl `..._sawtooth` | neck and heads ramp, decay to 0; whole net ramps, then decays |
| `frozen` | linear probing | neck and heads: ramp, then decay; the backbone never learns |

`module.warmup_steps` and `module.schedule` describe the whole net's part (for `frozen`: all there is), which ends at
`trainer.max_steps`. A phase begins with an optimiser that remembers nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pretrain3d.config import UserError
from pretrain3d.modules.optim import warmup_then
from pretrain3d.registry import CONTRACTS


@dataclass(frozen=True)
class Phase:
    """A stretch of a run.

    Attributes:
        start: its first optimiser step.
        frozen: whether the backbone stays as it is.
        factor: steps since ``start`` -> factor of the learning rate.
        restarts: whether the optimiser's memory (momentum, second moments) is dropped at ``start``.
    """

    start: int
    frozen: bool
    factor: Callable[[int], float]
    restarts: bool = True


@dataclass(frozen=True)
class Timetable:
    """The phases of a run, the first from step 0, and what distinguishes the learning rates of its parts.

    Attributes:
        phases: in the order of their starts.
        backbone_lr: factor of the backbone's learning rate.
        layer_decay: see `optim.parameter_groups`.
    """

    phases: tuple[Phase, ...]
    backbone_lr: float = 1.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        starts = [phase.start for phase in self.phases]
        if starts != sorted(set(starts)) or starts[:1] != [0]:
            raise UserError(f"the phases of module.finetune start at {starts}; the first is at 0, each later than the "
                            f"one before ({CONTRACTS})")  # fmt: skip
        if not self.backbone_lr > 0:
            raise UserError(f"module.finetune.backbone_lr is {self.backbone_lr}; it is a factor above 0 (name: frozen "
                            "keeps the backbone as it is)")  # fmt: skip
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"module.finetune.layer_decay is {self.layer_decay}; it is above 0 and at most 1")

    def at(self, step: int) -> int:
        """Index of the phase of an optimiser step."""
        return max(index for index, phase in enumerate(self.phases) if phase.start <= step)

    def factor(self, network: str, step: int) -> float:
        """Factor of the learning rate of ``"backbone"`` (or ``"backbone.<layer>"``) or of anything else."""
        phase = self.phases[self.at(step)]
        if phase.frozen and network.split(".")[0] == "backbone":
            return 0.0
        return phase.factor(step - phase.start)

    def then(self, start: int, factor: Callable[[int], float]) -> Timetable:
        """The same with another course of the learning rate from ``start`` on; the optimiser just goes on."""
        assert start > self.phases[-1].start, (start, self.phases)
        added = Phase(start, self.phases[-1].frozen, factor, restarts=False)
        return Timetable((*self.phases, added), self.backbone_lr, self.layer_decay)


def whole(
    schedule: str, warmup_steps: int, max_steps: int, backbone_lr: float = 1.0, layer_decay: float = 1.0
) -> Timetable:
    """One linear ramp over the whole net, then the schedule."""
    return Timetable((Phase(0, False, warmup_then(schedule, warmup_steps, max_steps)),), backbone_lr, layer_decay)


def frozen(schedule: str, warmup_steps: int, max_steps: int) -> Timetable:
    """Only neck and heads learn."""
    return Timetable((Phase(0, True, warmup_then(schedule, warmup_steps, max_steps)),))


def two_phase(
    schedule: str,
    warmup_steps: int,
    max_steps: int,
    head_steps: int,
    head_lr: float = 1.0,
    backbone_lr: float = 1.0,
    layer_decay: float = 1.0,
) -> Timetable:
    """A ramp over neck and heads alone, then a ramp over the whole net and the schedule.

    Args:
        schedule, warmup_steps, max_steps: of the whole net's phase; the head's steps count in ``max_steps``.
        head_steps: length of the first ramp; published: 3 of 53 epochs.
        head_lr: factor of the learning rate at the end of the first ramp.
        backbone_lr, layer_decay: see `Timetable`.
    """
    head = _scaled(warmup_then("constant", head_steps, head_steps + 1), head_lr)
    net = _whole_net("two_phase", {"head_steps": head_steps}, schedule, warmup_steps, max_steps)
    return Timetable((Phase(0, True, head), net), backbone_lr, layer_decay)


def sawtooth(
    schedule: str,
    warmup_steps: int,
    max_steps: int,
    head_warmup_steps: int,
    head_decay_steps: int,
    head_lr: float = 1.0,
    backbone_lr: float = 1.0,
    layer_decay: float = 1.0,
) -> Timetable:
    """Neck and heads alone ramp up and decay (poly) to 0, then the whole net ramps up and decays.

    Args:
        schedule, warmup_steps, max_steps: of the whole net's phase; the head's steps count in ``max_steps``.
        head_warmup_steps, head_decay_steps: of the head's tooth; published: 25 and 25 of 1,000 epochs, the whole net's
            warm-up 50.
        head_lr: factor of the learning rate at the top of the head's tooth; published 1, for Transformers 0.01 or 0.1.
        backbone_lr, layer_decay: see `Timetable`.
    """
    steps = {"head_warmup_steps": head_warmup_steps, "head_decay_steps": head_decay_steps}
    net = _whole_net("sawtooth", steps, schedule, warmup_steps, max_steps)
    tooth = warmup_then("poly", head_warmup_steps, head_warmup_steps + head_decay_steps)
    return Timetable((Phase(0, True, _scaled(tooth, head_lr)), net), backbone_lr, layer_decay)


def _whole_net(name: str, head: dict[str, int], schedule: str, warmup_steps: int, max_steps: int) -> Phase:
    """The last phase: all that the head's steps leave."""
    for key, value in head.items():
        if value < 1:
            raise UserError(f"module.finetune.{key} is {value}; {name} needs at least 1")
    steps = sum(head.values())
    if steps + warmup_steps >= max_steps:
        said = " + ".join(f"{key}={value}" for key, value in head.items())
        raise UserError(
            f"module.finetune {name}: {said} and module.warmup_steps={warmup_steps} leave nothing of {max_steps} "
            "steps; make them shorter or trainer.max_steps (with module.swa.lr: module.swa.start_step) longer"
        )
    return Phase(steps, False, warmup_then(schedule, warmup_steps, max_steps - steps))


def _scaled(factor: Callable[[int], float], by: float) -> Callable[[int], float]:
    if not by > 0:
        raise UserError(f"module.finetune.head_lr is {by}; it is a factor above 0")
    return lambda step: by * factor(step)

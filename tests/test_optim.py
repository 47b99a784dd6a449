"""Which parameters decay, and which layer learns how fast."""

from __future__ import annotations

import math

import pytest
import torch
from backbone_variants import VARIANTS
from torch import nn

from pretrain3d.backbones import BACKBONES
from pretrain3d.backbones.resenc import resenc_xs
from pretrain3d.config import UserError
from pretrain3d.modules.optim import OPTIMIZERS, parameter_groups, schedule, sgd
from pretrain3d.registry import build


class Tokens(nn.Module):
    """A little Transformer: what its parameters are called decides what happens to them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(1, 4, 2, 2)
        self.positions = nn.Parameter(torch.zeros(1, 8, 4))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.blocks = nn.ModuleList(nn.MultiheadAttention(4, 2) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.queries = nn.Embedding(5, 4)
        self.fixed = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    def layers(self) -> list[tuple[nn.Module, ...]]:
        return [(self.blocks[0],), (self.blocks[1],), (self.blocks[2], self.norm)]


def names_of(groups: list[dict[str, object]], network: nn.Module, decayed: bool) -> set[str]:
    by_id = {id(parameter): name for name, parameter in network.named_parameters()}
    return {by_id[id(p)] for group in groups if bool(group["weight_decay"]) == decayed for p in group["params"]}  # type: ignore[attr-defined]


def test_matrices_decay_and_nothing_else() -> None:
    network = Tokens()
    groups = parameter_groups({"net": network}, 0.1)
    decayed = names_of(groups, network, True)
    blocks = {f"blocks.{i}.{name}" for i in range(3) for name in ("in_proj_weight", "out_proj.weight")}
    assert decayed == {"embed.weight"} | blocks
    everything = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert names_of(groups, network, False) == everything - decayed and "fixed" not in everything


def scales(network: nn.Module, **settings: float) -> dict[str, float]:
    groups = parameter_groups({"backbone": network, "head": nn.Linear(2, 2)}, 0.1, **settings)
    by_id = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {group["lr_scale"] for group in groups if group["name"] == "head"} == {1.0}
    return {name: by_id[id(p)] for name, p in network.named_parameters() if p.requires_grad}


def test_earlier_layers_learn_slower() -> None:
    found = scales(resenc_xs(), layer_decay=0.5)
    for name, scale in found.items():
        layer = int(name.split(".")[1]) + 1 if name.startswith("stages.") else 0
        assert scale == pytest.approx(0.5 ** (6 - layer)), name  # 5 stages: the last at half the head's rate


def test_layers_of_a_transformer() -> None:
    found = scales(Tokens(), layer_decay=0.5, backbone_lr=0.1)
    assert found["positions"] == found["mask_token"] == found["embed.weight"] == pytest.approx(0.1 * 0.5**4)
    assert found["blocks.0.in_proj_weight"] == pytest.approx(0.1 * 0.5**3)
    assert found["blocks.2.in_proj_bias"] == found["norm.weight"] == pytest.approx(0.1 * 0.5)


def called_in_order(backbone: nn.Module) -> list[str]:
    """Names of the parameters in the order in which a forward pass calls their modules."""
    called: list[str] = []
    for name, module in backbone.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    x, y, z = backbone.size_multiple
    backbone(torch.empty(1, backbone.in_channels, 4 * x, 2 * y, 2 * z))

    def place(name: str) -> int:
        owner = name.rpartition(".")[0]
        while owner not in called:  # torch's attention uses its last layer's weights without calling it
            owner = owner.rpartition(".")[0]
        return called.index(owner)

    return sorted((name for name, _ in backbone.named_parameters()), key=place)


@pytest.mark.parametrize("name", BACKBONES)
def test_rates_rise_with_the_depth_of_every_backbone(name: str) -> None:
    arguments = VARIANTS[name].arguments if name in VARIANTS else {}
    with torch.device("meta"):
        backbone = build(BACKBONES, {"name": name, **arguments}, "backbone")
        groups = parameter_groups({"backbone": backbone}, 0.1, layer_decay=0.5)
        order = called_in_order(backbone)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in backbone.parameters()), "each in exactly one group"
    found = scales(backbone, layer_decay=0.5)
    rates = [found[each] for each in order]
    assert rates == sorted(rates)
    count = len(backbone.layers())
    assert set(rates) == {0.5 ** (count + 1 - layer) for layer in range(count + 1)}
    assert {found[each] for each in backbone.input_weights} == {rates[0]}, "the stem learns slowest"
    assert count >= max(2, len(backbone.levels) - 1), "the finest level may be the stem's"


def test_a_backbone_may_learn_slower_as_a_whole() -> None:
    assert parameter_groups({"backbone": nn.Linear(2, 2)}, 0.0, backbone_lr=0.5)[0]["lr_scale"] == 0.5


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"name": "adamw", "lr": -1.0}, "lr is -1.0; it must be above 0"),
        ({"name": "sgd", "lr": math.nan}, "sgd: lr must be a finite number, got nan"),
        ({"name": "sgd", "lr": math.inf}, "lr is inf; it must be above 0"),
        ({"name": "adamw", "lr": 0.1, "betas": [1.5, 0.9]}, r"betas is \[1.5, 0.9\]; it must be two numbers from 0 to"),
        ({"name": "adamw", "lr": 0.1, "eps": -1.0}, "eps is -1.0; it must be 0 or more"),
        ({"name": "sgd", "lr": 0.1, "momentum": 1.0}, "momentum is 1.0; it must be from 0 to below 1"),
        ({"name": "sgd", "lr": 0.1, "momentum": 0.0}, "momentum is 0.0; it must be above 0 unless nesterov=false"),
    ],
)
def test_a_number_out_of_its_range_is_named(node: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=f"module.optimizer.{said}"):
        build(OPTIMIZERS, node, "module.optimizer", groups=parameter_groups({"net": nn.Linear(2, 2)}, 0.0))


@pytest.mark.parametrize(
    "node",
    [
        {"name": "adamw", "lr": 0.1, "betas": [0.8, 0.95], "eps": 1e-4, "amsgrad": True},
        {"name": "sgd", "lr": 0.1, "momentum": 0.99, "nesterov": True},
        {"name": "sgd", "lr": 0.1, "momentum": 0.5, "nesterov": False},
    ],
)
def test_every_argument_reaches_the_optimiser(node: dict[str, object]) -> None:
    groups = parameter_groups({"net": nn.Linear(2, 2)}, 0.0)
    optimizer = build(OPTIMIZERS, node, "module.optimizer", groups=groups)
    for group in optimizer.param_groups:
        found = {key: list(group[key]) if key == "betas" else group[key] for key in node if key != "name"}
        assert found == {key: value for key, value in node.items() if key != "name"}


@pytest.mark.parametrize("decay", [-1.0, math.nan, math.inf])
def test_a_weight_decay_out_of_its_range_is_named(decay: float) -> None:
    with pytest.raises(UserError, match=f"module.optimizer.weight_decay is {decay}; it must be 0 or more"):
        parameter_groups({"net": nn.Linear(2, 2)}, decay)


def test_the_scheduler_multiplies_group_and_step() -> None:
    groups = parameter_groups({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)}, 0.1, backbone_lr=0.5)
    optimizer = sgd(groups, lr=0.2)
    scheduler = schedule(optimizer, lambda name, step: (10.0 if name == "head" else 1.0) * step)
    for step in range(3):
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({"backbone": 0.2 * 0.5 * step, "head": 0.2 * 10 * step})
        optimizer.step()
        scheduler.step()

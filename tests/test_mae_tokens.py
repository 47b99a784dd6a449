"""MAE on every kind of backbone, and what is its own on Transformers: only visible tokens are encoded."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from backbone_variants import VARIANTS
from method_checks import check_bf16_gradients_of, generators
from torch import nn

from pretrain3d.backbones.decoders import TokenDecoder, image_decoder
from pretrain3d.backbones.primus import Primus
from pretrain3d.config import UserError
from pretrain3d.objectives.hidden import hidden_losses
from pretrain3d.objectives.mae import MAE, visible_tokens
from pretrain3d.objectives.masking import hidden_cells

TOKENS = ("primus", "vit")


def make(name: str, **arguments) -> tuple[nn.Module, MAE, dict[str, torch.Tensor]]:
    backbone, size = VARIANTS[name].build(), VARIANTS[name].size
    method = MAE(backbone.levels, 1, size, partial(image_decoder, backbone), **arguments)
    inside = torch.ones(2, 1, *size, dtype=torch.bool)
    inside[0, :, size[0] - 3 :] = False  # the volume ends in the patch
    return backbone, method, {"image": torch.randn(2, 1, *size), "inside": inside}


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_voxels_are_exactly_the_hidden_ones(name):
    _, method, batch = make(name)
    prepared = method.prepare(batch, generators(0, 1))
    prediction = torch.randn(batch["image"].shape, requires_grad=True)
    method.loss({"reconstruction": prediction}, prepared)["loss"].backward()
    assert torch.equal(prediction.grad != 0, ~prepared["keep"] & batch["inside"])
    assert 0 < (~prepared["keep"]).sum() < prepared["keep"].numel()


@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_voxels_influence_no_prediction_and_visible_ones_do(name):
    backbone, method, batch = make(name)
    backbone.eval()
    prepared = method.prepare(batch, generators(0, 1))
    seen = [torch.where(prepared["keep"], batch["image"], value) for value in (7.0, float("nan"))]
    moved = torch.where(prepared["keep"], batch["image"] * torch.linspace(0.5, 1.5, batch["image"].shape[-1]), 0.0)
    with torch.no_grad():
        a, b, c = (
            method(backbone, method.prepare({**batch, "image": image}, generators(0, 1)))["reconstruction"]
            for image in (*seen, moved)
        )
    assert a.shape == batch["image"].shape and a.isfinite().all()
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "resenc_xs" else ()) for n in VARIANTS]
)
def test_bf16_gives_a_float32_loss_and_every_parameter_a_gradient(name):
    check_bf16_gradients_of(*make(name))


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("block", [None, 16])
def test_only_visible_tokens_are_encoded(name, block):
    """The tokens that reach the first block of the encoder, against the voxels that the loss is over."""
    backbone = Primus(24, 1, 2, 8, 32) if name == "primus" else VARIANTS["vit"].build(image_size=32)
    method = MAE(backbone.levels, 1, (32, 32, 32), partial(image_decoder, backbone), block=block)
    image = torch.zeros(2, 1, 32, 32, 32)
    cell = torch.arange(64.0).view(4, 4, 4)  # every voxel of a token says which token it is
    image[:] = cell.repeat_interleave(8, 0).repeat_interleave(8, 1).repeat_interleave(8, 2)
    with torch.no_grad():
        backbone.embedding.weight.fill_(1 / 512)
        backbone.encoder.positions.zero_()
    seen = []
    backbone.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    prepared = method.prepare({"image": image, "inside": torch.ones_like(image, dtype=torch.bool)}, generators(0, 1))
    method(backbone, prepared)
    (tokens,) = seen
    assert method.num_visible == tokens.shape[1] == 16
    for sample in range(2):
        hidden = image[sample][~prepared["keep"][sample]].unique().tolist()
        encoded = tokens[sample, :, 0].round().long().tolist()
        assert sorted([*hidden, *encoded]) == list(range(64)), "hidden and encoded tokens make up the whole"


@pytest.mark.parametrize("name", TOKENS)
def test_the_decoder_sees_one_token_in_every_hidden_place(name):
    backbone, method, batch = make(name)
    fed = []
    method.decoder.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0][0]))
    prepared = method.prepare(batch, generators(0, 1))
    method(backbone, prepared)
    features = backbone(prepared["inputs"], prepared["keep"])[0]
    hidden = (features == 0).all(1)  # (B, x, y, z)
    assert hidden.sum(dim=(1, 2, 3)).tolist() == [hidden_cells(hidden[0].numel(), 0.75)] * 2
    assert (fed[0].movedim(1, -1)[hidden] == method.mask_token).all()
    assert torch.equal(fed[0].movedim(1, -1)[~hidden], features.movedim(1, -1)[~hidden])
    assert isinstance(method.decoder, TokenDecoder) and len(method.decoder.stack.blocks) == 2


@pytest.mark.parametrize("block", [3, (8, 8, 4), 5])
def test_blocks_that_cut_tokens_are_hidden_all_the_same(block):
    backbone, method, batch = make("primus", block=block, decoder_blocks=1)
    assert method.num_visible is None
    prepared = method.prepare(batch, generators(0, 1))
    losses = hidden_losses(method(backbone, prepared)["reconstruction"], prepared, True)
    losses["loss"].backward()
    assert all(p.grad.isfinite().all() for p in backbone.parameters())
    noise = torch.where(prepared["keep"], batch["image"], 100.0)
    other = method.prepare({**batch, "image": noise}, generators(0, 1))
    assert torch.equal(backbone(noise, other["keep"])[0], backbone(batch["image"], prepared["keep"])[0])


def test_visible_tokens_at_the_reference_size():
    assert visible_tokens((160, 160, 160), (8, 8, 8), (8, 8, 8), 0.75) == 2000
    assert visible_tokens((160, 160, 160), (16, 16, 16), (8, 8, 8), 0.75) == 250 * 8
    assert visible_tokens((160, 160, 160), (12, 12, 12), (8, 8, 8), 0.75) is None
    assert visible_tokens((40, 40, 40), (16, 16, 16), (8, 8, 8), 0.75) is None


def test_defaults_follow_the_backbone():
    assert make("primus")[1].block == (4, 8, 8) and make("vit")[1].block == (8, 8, 8)
    assert make("swin")[1].block == (4, 8, 4) and make("swin")[1].num_visible is None
    with pytest.raises(UserError, match="decoder_blocks is 2; it is null, or 0 or more for a Transformer"):
        make("resenc", decoder_blocks=2)
    assert len(make("primus", decoder_blocks=3)[1].decoder.stack.blocks) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae, primus_m", *[f"simmim, primus_{size}" for size in "sbml"]])
def test_cost_is_that_of_the_reference(name, monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    from pretrain_cost import WORKLOADS, tflop

    work = WORKLOADS[name]
    forward, total, parameters = tflop(work)
    assert (forward, total) == (pytest.approx(work.forward, rel=0.01), pytest.approx(work.total, rel=0.01))
    if work.method == "mae":  # 151,786,529 and a decoder of 2 blocks with its positions, norm and mask token
        assert parameters / 1e6 == pytest.approx(176.66, abs=0.01)

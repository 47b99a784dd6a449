"""Pyramids from the single level of a Transformer, and equal channels."""

import pytest
import torch

from pretrain3d.backbones.contract import Level
from pretrain3d.config import UserError
from pretrain3d.detection import DETECTORS
from pretrain3d.detection.necks import ChannelMapper, SimplePyramid, chosen_levels, pyramid_levels
from pretrain3d.registry import build, takes

ANCHORS = {"boxes": [[4, 4, 4]]}
SMALL = {
    "retina_unet": {"fpn_channels": 8, "num_convs": 1, "anchors": ANCHORS},
    "retinanet": {"fpn_channels": 8, "num_convs": 1, "anchors": ANCHORS},
    "deformable_detr": {"hidden": 16, "heads": 2, "points": 2, "encoder_layers": 1, "decoder_layers": 1, "ffn": 16},
}


def strides(levels: tuple[Level, ...]) -> list[tuple[int, int, int]]:
    return [level.stride for level in levels]


@pytest.mark.parametrize(
    ("stride", "expected"),
    [
        ((8, 8, 8), [(2,) * 3, (4,) * 3, (8,) * 3, (16,) * 3, (32,) * 3]),
        ((16, 16, 16), [(2,) * 3, (4,) * 3, (8,) * 3, (16,) * 3, (32,) * 3]),
        ((2, 8, 8), [(1, 2, 2), (1, 4, 4), (2, 8, 8), (4, 16, 16), (8, 32, 32)][:5]),
        ((14, 14, 14), [(7,) * 3, (14,) * 3, (28,) * 3, (56,) * 3]),
        ((32, 32, 32), [(2,) * 3, (4,) * 3, (8,) * 3, (16,) * 3, (32,) * 3]),
    ],
)
def test_strides_of_the_pyramid(stride: tuple[int, int, int], expected: list[tuple[int, int, int]]) -> None:
    levels = pyramid_levels([Level(32, stride)])
    assert strides(levels) == expected
    base = expected.index(stride)
    assert [level.channels for level in levels[base:]] == [32] * (len(levels) - base)
    assert [level.channels for level in levels[:base]] == [32 // 2**n if n < 3 else 8 for n in range(base, 0, -1)]


def test_several_levels_stay_what_they_are() -> None:
    levels = (Level(8, (1, 1, 1)), Level(16, (2, 2, 2)))
    assert pyramid_levels(levels) == levels


def test_maps_have_the_promised_shapes_and_no_parameter_is_dead() -> None:
    level = Level(32, (8, 8, 4))
    levels = pyramid_levels([level])
    pyramid = SimplePyramid(level, finest=1, coarsest=3)
    feature = torch.randn(2, 32, 4, 2, 8, requires_grad=True)
    maps = pyramid([feature])
    assert maps[0] is None and maps[2] is feature and len(maps) == 4
    for one, other in zip(maps[1:], levels[1:4], strict=True):
        assert one is not None
        assert one.shape == (2, other.channels, *(n // s for n, s in zip((32, 16, 32), other.stride, strict=True)))
    torch.testing.assert_close(maps[3], torch.nn.functional.max_pool3d(feature, 2))
    sum(m.square().mean() for m in maps[1:]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pyramid.parameters())
    assert pyramid([feature], finest=2)[1] is None
    kinds = [[type(layer).__name__ for layer in up] for up in SimplePyramid(level, finest=0, coarsest=3).up.values()]
    assert kinds == [["ConvTranspose3d"], ["GroupNorm", "GELU", "ConvTranspose3d"]]


def test_a_map_that_cannot_be_halved_is_named() -> None:
    pyramid = SimplePyramid(Level(8, (8, 8, 8)), finest=1, coarsest=4)
    with pytest.raises(UserError, match=r"48 x 48 x 48.*multiple of 32 x 32 x 32.*detection_levels=\[1, 2, 3\]"):
        pyramid([torch.randn(1, 8, 6, 6, 6)])
    assert SimplePyramid(Level(8, (8, 8, 8)), 1, 3)([torch.randn(1, 8, 6, 6, 6)])[3] is not None


@pytest.mark.parametrize("name", sorted(DETECTORS))
@pytest.mark.parametrize("more", [{}, {"detection_levels": [1, 2]}, {"detection_levels": [3]}])
def test_every_detector_works_on_one_level(name: str, more: dict[str, object]) -> None:
    shape, levels = (32, 32, 32), [Level(16, (8, 8, 8))]
    node = {"name": name, **SMALL.get(name, {})}
    node |= {key: value for key, value in more.items() if takes(DETECTORS, node, "detector", key)}
    detector = build(DETECTORS, node, "detector", levels=levels, num_classes=2)
    feature = torch.randn(2, 16, 4, 4, 4, requires_grad=True)
    batch = {
        "image": torch.zeros(2, 1, *shape),
        "boxes": torch.tensor([[[4.0, 4, 4, 12, 12, 12]], [[0.0, 0, 0, 0, 0, 0]]]),
        "labels": torch.zeros(2, 1, dtype=torch.long),
        "valid": torch.tensor([[True], [False]]),
        "annotated": torch.ones(2, 2, dtype=torch.bool),
        "inside": torch.ones(2, 1, *shape, dtype=torch.bool),
        "mask": torch.zeros(2, *shape, dtype=torch.uint8),
    }
    detector.loss(detector([feature], shape), batch)["loss"].backward()
    assert feature.grad is not None and feature.grad.abs().sum() > 0
    without = [n for n, p in detector.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without
    found = detector.eval().predict(detector([feature], shape), shape)
    assert len(found) == 2 and all((f.boxes >= 0).all() and (f.boxes <= 32).all() for f in found)


def test_mapper_gives_equal_normalised_channels() -> None:
    levels = [Level(4, (1, 1, 1)), Level(6, (2, 2, 2)), Level(10, (4, 4, 4))]
    mapper = ChannelMapper(levels, (1, 2), 32)
    maps = mapper([None, torch.randn(2, 6, 4, 4, 4), torch.randn(2, 10, 2, 2, 2)])
    assert [m.shape for m in maps] == [(2, 32, 4, 4, 4), (2, 32, 2, 2, 2)]
    grouped = maps[0].reshape(2, 4, -1)  # groups of 8 channels
    torch.testing.assert_close(grouped.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(grouped.std(-1, correction=0), torch.ones(2, 4), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("wanted", "count", "expected"),
    [(None, 6, (2, 3, 4, 5)), (None, 5, (1, 2, 3, 4)), (None, 1, (0,)), ((0, 3), 4, (0, 3))],
)
def test_chosen_levels(wanted: tuple[int, ...] | None, count: int, expected: tuple[int, ...]) -> None:
    assert chosen_levels(wanted, count) == expected

"""Whole volumes through a simulated perfect detector: tiles, mirrored views and merging must cost nothing."""

import itertools
import time
from typing import Any

import pytest
import torch

from pretrain3d import boxes as box_ops
from pretrain3d.config import UserError
from pretrain3d.detection.contract import Detections
from pretrain3d.detection.merge import Merging, merge
from pretrain3d.detection.tiles import predict_views, tile_starts


def predict_volume(*arguments: Any, merging: Merging = Merging(), **options: Any) -> Detections:  # noqa: B008
    """The views of a volume, merged."""
    return merge(predict_views(*arguments, **options), merging)


@pytest.mark.parametrize(
    "shape, patch, overlap, count",
    [
        ((256, 256, 256), (128, 128, 128), 0.5, 27),
        ((160, 160, 160), (128, 128, 128), 0.5, 8),
        ((300, 300, 300), (128, 128, 128), 0.5, 64),
        ((128, 100, 128), (128, 128, 128), 0.5, 1),
        ((200, 512, 512), (96, 192, 192), 0.5, 4 * 5 * 5),
        ((96, 96, 96), (48, 48, 48), 0.0, 8),
    ],
)
def test_number_of_tiles(shape, patch, overlap, count):
    assert len(tile_starts(shape, patch, overlap)) == count


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.9])
def test_tiles_are_distinct_lie_inside_and_overlap_enough(overlap):
    for size, patch in itertools.product((7, 8, 9, 16, 23, 40), (4, 8, 11)):
        starts = [start[0] for start in tile_starts((size, 4, 4), (patch, 4, 4), overlap)]
        assert starts == sorted(set(starts)) and starts[0] == 0
        assert starts[-1] + patch == max(size, patch)
        wanted = int(overlap * patch)
        assert all(a + patch - b >= wanted for a, b in itertools.pairwise(starts))
        fewest = -(-max(size - patch, 0) // max(patch - wanted, 1)) + 1
        assert len(starts) == fewest


def test_an_impossible_overlap_is_named():
    with pytest.raises(UserError, match=r"overlap is 1\.0"):
        tile_starts((8, 8, 8), (4, 4, 4), 1.0)


def coordinates(shape) -> torch.Tensor:
    """(3, X, Y, Z) image whose channels are the voxel's own indices, so that a patch tells where it is."""
    return torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))


class PerfectDetector:
    """Reports exactly the visible part of every object, cut ones too, with the same score.

    In a patch mirrored along axis 0 a network sees the other body side: left and right labels come out swapped.
    """

    def __init__(self, boxes: torch.Tensor, labels: torch.Tensor, swap: dict[int, int] | None = None) -> None:
        self.boxes, self.labels, self.swap = boxes, labels, swap or {}
        self.batches: list[int] = []

    def __call__(self, patches: torch.Tensor) -> list[Detections]:
        self.batches.append(len(patches))
        return [self.look(patch) for patch in patches]

    def look(self, patch: torch.Tensor) -> Detections:
        shape = patch.shape[1:]
        inside = (patch >= 0).all(dim=0).nonzero()
        first, last = inside[0].tolist(), inside[-1].tolist()
        boxes, labels = self.boxes.clone(), self.labels.clone()
        for axis in range(3):
            a, b = (float(patch[axis][tuple(place)]) for place in (first, last))
            low, high = self.boxes[:, axis], self.boxes[:, axis + 3]
            if a <= b:
                boxes[:, axis], boxes[:, axis + 3] = low - a + first[axis], high - a + first[axis]
                continue
            boxes[:, axis], boxes[:, axis + 3] = a + 1 - high + first[axis], a + 1 - low + first[axis]
            if axis == 0:
                labels = torch.tensor([self.swap.get(int(label), int(label)) for label in self.labels])
        boxes = box_ops.clip(boxes, tuple(shape))
        seen = (box_ops.sizes(boxes) > 0).all(dim=1)
        return Detections(boxes[seen], torch.full((int(seen.sum()),), 0.9), labels[seen])


def spread_objects(shape, smallest: int, largest: int, seed: int) -> torch.Tensor:
    """Boxes that do not touch, one per cell of a lattice, some at the borders of the volume."""
    generator = torch.Generator().manual_seed(seed)
    cell = largest + 2
    boxes = []
    for corner in itertools.product(*(range(0, n - largest + 1, cell) for n in shape)):
        size = torch.randint(smallest, largest + 1, (3,), generator=generator)
        low = torch.tensor(corner) + (torch.rand(3, generator=generator) * (largest - size + 1)).long()
        boxes.append(torch.cat([low, low + size]))
    return torch.stack(boxes).float()


def assert_found_exactly(found: Detections, boxes: torch.Tensor, labels: torch.Tensor) -> None:
    overlap = box_ops.iou(boxes, found.boxes)
    assert len(found) == len(boxes), f"{len(found)} detections of {len(boxes)} objects"
    assert overlap.amax(dim=1).min() >= 0.99
    assert torch.equal(found.labels[overlap.argmax(dim=1)], labels)
    torch.testing.assert_close(found.scores, torch.full((len(boxes),), 0.9))


@pytest.mark.parametrize("method", ["clustering", "nms"])
@pytest.mark.parametrize("mirror_axes", [(), (0,), (0, 1, 2)])
@pytest.mark.parametrize("shape", [(70, 50, 41), (32, 20, 90), (20, 18, 25)])
def test_a_perfect_detector_comes_back_perfect(shape, mirror_axes, method):
    boxes = spread_objects(shape, 3, 13, seed=sum(shape))
    labels = torch.arange(len(boxes)) % 3
    detector = PerfectDetector(boxes, labels, {0: 1, 1: 0})
    found = predict_volume(
        detector,
        coordinates(shape),
        (32, 32, 32),
        overlap=0.5,
        batch_size=3,
        pad_value=-1.0,
        mirror_axes=mirror_axes,
        mirror_classes={0: 1},
        merging=Merging(method=method),
    )
    assert_found_exactly(found, boxes, labels)
    assert max(detector.batches) <= 3
    assert sum(detector.batches) == len(tile_starts(shape, (32, 32, 32), 0.5)) * 2 ** len(mirror_axes)


def test_objects_larger_than_the_patch_are_joined():
    boxes = torch.tensor([[2.0, 3, 4, 68, 12, 70], [5, 40, 30, 9, 44, 34]])
    labels = torch.tensor([1, 1])
    found = predict_volume(PerfectDetector(boxes, labels), coordinates((80, 60, 72)), (32, 32, 32), 0.5, 4, -1.0)
    assert_found_exactly(found, boxes, labels)


def test_touching_neighbours_stay_apart():
    boxes = torch.tensor([[10.0, 10, 10, 20, 20, 20], [20, 10, 10, 30, 20, 20], [30, 10, 10, 40, 20, 20]])
    labels = torch.zeros(3, dtype=torch.long)
    found = predict_volume(PerfectDetector(boxes, labels), coordinates((64, 32, 32)), (32, 32, 32), 0.5, 4, -1.0)
    assert_found_exactly(found, boxes, labels)


def test_padding_is_per_channel_and_detections_in_it_are_dropped():
    seen = []

    def only_padding(patches):
        seen.append(patches)
        box = torch.tensor([[0.0, 0, 0, 3, 16, 16], [0, 0, 0, 8, 16, 16]])
        return [Detections(box, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]))] * len(patches)

    found = predict_volume(only_padding, torch.zeros(2, 10, 16, 16), (16, 16, 16), 0.5, 1, [-5.0, 7.0])
    assert (seen[0][0, 0, :3] == -5).all() and (seen[0][0, 1, -3:] == 7).all() and (seen[0][0, :, 3:13] == 0).all()
    assert found.boxes.tolist() == [[0, 0, 0, 5, 16, 16]] and found.labels.tolist() == [1]


def test_a_volume_without_detections():
    none = Detections(torch.zeros(0, 6), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    for axes in ((), (1, 2)):
        found = predict_volume(lambda p: [none] * len(p), torch.zeros(1, 40, 40, 40), (32, 32, 32), mirror_axes=axes)
        assert found.boxes.shape == (0, 6) and found.labels.dtype == torch.long


def test_at_most_so_many_per_class():
    boxes = spread_objects((60, 60, 60), 4, 8, seed=0)
    labels = torch.arange(len(boxes)) % 2
    for axes in ((), (2,)):
        detector = PerfectDetector(boxes, labels)
        found = predict_volume(
            detector,
            coordinates((60, 60, 60)),
            (32, 32, 32),
            0.5,
            8,
            -1.0,
            mirror_axes=axes,
            merging=Merging(max_per_class=5),
        )
        assert found.labels.bincount().tolist() == [5, 5]


@pytest.mark.parametrize(
    "arguments, message", [({"batch_size": 0}, "tile_batch is 0"), ({"mirror_axes": [3]}, "mirror_axes")]
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        predict_volume(lambda p: [], torch.zeros(1, 8, 8, 8), (8, 8, 8), **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_says_what_to_lower(error):
    def starved(patches):
        raise error

    image = torch.zeros(1, 8, 8, 8)
    with pytest.raises(UserError, match="out of memory with tiles of 4 x 8 x 8, 2 at once: try a lower tile_batch, "):
        predict_volume(starved, image, (4, 8, 8), batch_size=2)
    with pytest.raises(UserError, match="tiles of 4 x 8 x 8, 1 at once: try precision bf16, or smaller tiles"):
        predict_volume(starved, image, (4, 8, 8))


def test_another_error_of_the_network_stays_itself():
    def broken(patches):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        predict_volume(broken, torch.zeros(1, 8, 8, 8), (4, 8, 8))


def test_everything_but_the_network_takes_under_a_second_at_300():
    generator = torch.Generator().manual_seed(0)

    def noise(patches):
        low = torch.rand(100, 3, generator=generator) * 110
        boxes = torch.cat([low, low + 4 + 14 * torch.rand(100, 3, generator=generator)], dim=1)
        scores, labels = torch.rand(100, generator=generator), torch.randint(0, 3, (100,), generator=generator)
        return [Detections(boxes, scores, labels)] * len(patches)

    image = torch.zeros(1, 300, 300, 300)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        predict_volume(noise, image, (128, 128, 128), 0.5, 1)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.0, seconds

"""The synchronised metric: the numbers of `evaluate`, repeated cases, and two processes with uneven cases."""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_matching import random_cases

from pretrain3d.evaluation.metric import DetectionMetric
from pretrain3d.evaluation.protocol import evaluate

CLASSES = ["a", "b"]


@dataclass
class Found:
    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor


def feed(metric: DetectionMetric, indices: list[int], seed: int = 0, cases: int = 9) -> None:
    predictions, targets = random_cases(seed, cases=cases, boxes=20, objects=4, classes=2)
    for index in indices:
        found, true = predictions[f"case{index}"], targets[f"case{index}"]
        metric.update(
            index,
            Found(
                torch.tensor(found["boxes"], dtype=torch.float32),
                torch.tensor(found["scores"], dtype=torch.float32),
                torch.tensor(found["labels"]),
            ),
            torch.tensor(true["boxes"], dtype=torch.float32).reshape(-1, 6),
            torch.tensor(true["labels"]),
            None if index % 2 else (0, 1),
        )


def single(indices: list[int]) -> dict[str, float]:
    metric = DetectionMetric(CLASSES)
    feed(metric, indices)
    return metric.compute()


def test_equals_evaluate_in_any_order_and_with_repeats() -> None:
    predictions, targets = random_cases(0, cases=9, boxes=20, objects=4, classes=2)
    for entry in predictions.values():
        entry["scores"] = entry["scores"].astype(np.float32)
    expected = evaluate(predictions, targets, CLASSES)
    result = single(list(range(9)))
    for key in ("mAP", "AP@0.10", "AP@0.50", "FROC@0.10"):
        assert result[key] == expected[key]
    for name in CLASSES:
        assert result[f"AP@0.10/{name}"] == expected["per_class"][name]["AP@0.10"]
    assert single([3, 0, 8, 1, 2, 5, 4, 7, 6]) == result
    assert single([0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1]) == result
    assert all(isinstance(value, float) for value in result.values())


def test_reset_forgets() -> None:
    metric = DetectionMetric(CLASSES)
    feed(metric, [0, 1, 2])
    metric.compute()
    metric.reset()
    feed(metric, [4, 5])
    assert metric.compute() == single([4, 5])


def test_annotated_keeps_false_positives_out() -> None:
    box = torch.tensor([[0.0, 0, 0, 4, 4, 4]])
    found = Found(torch.cat([box + 20, box]), torch.tensor([0.9, 0.8]), torch.tensor([1, 0]))
    values = []
    for annotated in ((0,), None):
        metric = DetectionMetric(CLASSES)
        metric.update(0, found, box, torch.tensor([0]), annotated)
        metric.update(1, Found(box, torch.tensor([0.5]), torch.tensor([1])), box, torch.tensor([1]))
        values.append(metric.compute()["AP@0.10/b"])
    assert values == [1.0, 0.5]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_case_and_no_object_are_nan() -> None:
    assert all(math.isnan(value) for value in DetectionMetric(CLASSES).compute().values())
    metric = DetectionMetric(CLASSES)
    none = torch.zeros(0, 6)
    metric.update(0, Found(none, torch.zeros(0), torch.zeros(0, dtype=torch.long)), none, torch.zeros(0))
    assert all(math.isnan(value) for value in metric.compute().values())


def test_a_score_that_is_not_finite_names_its_case() -> None:
    box = torch.tensor([[0.0, 0, 0, 4, 4, 4]])
    with pytest.raises(ValueError, match="case 7"):
        DetectionMetric(CLASSES).update(
            7, Found(box, torch.tensor([float("nan")]), torch.tensor([0])), box, torch.tensor([0])
        )


def _worker(rank: int, shares: list[list[int]], folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(shares))
    metric = DetectionMetric(CLASSES)
    results = []
    for _ in range(2):  # the second round shows that reset and unsync leave nothing behind
        feed(metric, shares[rank])
        results.append(metric.compute())
        metric.reset()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    "shares",
    [
        [[0, 2, 4, 6, 8], [1, 3, 5, 7, 0]],  # a sampler that repeats case 0 to fill up
        [[0, 1, 2, 3, 4, 5, 6], [7, 8]],
        [[0, 1, 2, 3, 4, 5, 6, 7, 8], []],  # a process without a case
    ],
)
def test_two_processes_equal_one(shares: list[list[int]]) -> None:
    expected = single(list(range(9)))
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, str(Path(__file__).parent))  # the spawned processes import this file again
        mp.spawn(_worker, args=(shares, folder), nprocs=2, join=True)
        for rank in range(2):
            assert torch.load(f"{folder}/{rank}.pt") == [expected, expected]

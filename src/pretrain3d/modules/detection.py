"""Detection: any detector of `DETECTORS` on any backbone, trained on patches, validated on whole volumes."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pretrain3d.config import UserError, by_text
from pretrain3d.data.case import Case
from pretrain3d.data.module import NO_CASE
from pretrain3d.data.semantic import unpaired_sides
from pretrain3d.detection import DETECTORS
from pretrain3d.detection.contract import Detections, Detector, check_detections
from pretrain3d.detection.merge import Merging, TileDetections, merge
from pretrain3d.detection.tiles import LATERAL_AXIS, check_tiling, predict_views
from pretrain3d.devices import short_precision
from pretrain3d.evaluation.metric import DetectionMetric
from pretrain3d.modules.base import BaseModule
from pretrain3d.registry import CONTRACTS, build, check_promises

PRECISIONS: dict[str, torch.dtype | None] = {"32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class DetectionModule(BaseModule):
    """Lightning's side of a detector.

    After construction ``merging`` (what `sweep` stored in the checkpoint's note, else ``unswept``, as configured) and
    ``precision`` (of the inference, a name of `PRECISIONS`: as in training) may be set.

    Args:
        backbone: see `BaseModule`.
        detector: ``{"name": a name in DETECTORS, ...}``.
        classes: names of the classes, in the order of the labels.
        mirror_classes: left/right pairs, by name, for mirrored views; those of organs are left alone.
        patch_size: (3,) voxels of a training patch.
        note, optimizer, schedule, warmup_steps, ema, finetune, swa: see `BaseModule`.
        tile_size: (3,) voxels of a tile of the inference, as the backbone takes them; ``None`` = the training patch.
        overlap: share of a tile that its neighbour repeats, in [0, 1).
        tile_batch: tiles predicted at once; bounds the memory of the inference.
        mirror_axes: axes of the mirrored views that are predicted too and merged, () for none. Axis 0 is left out, with
            a warning, where a class is left or right and has no counterpart in ``mirror_classes``.
        merging: values of `merge.Merging` other than its defaults, such as ``{"method": "nms"}``, until a sweep.

    Raises:
        UserError: an argument of the detector, or a size, overlap or axis of the inference, that does not work.
    """

    detector: Any  # from the registry; see `detection.contract.Detector`

    def __init__(
        self,
        backbone: Any,
        detector: dict[str, Any],
        classes: list[str],
        mirror_classes: dict[str, str],
        patch_size: tuple[int, int, int],
        note: dict[str, Any],
        optimizer: dict[str, Any],
        schedule: str = "poly",
        warmup_steps: int = 0,
        ema: float | None = None,
        tile_size: tuple[int, int, int] | None = None,
        overlap: float = 0.5,
        tile_batch: int = 4,
        mirror_axes: tuple[int, ...] = (),
        merging: dict[str, Any] | None = None,
        finetune: dict[str, Any] | None = None,
        swa: dict[str, Any] | None = None,
    ) -> None:
        check_tiling(overlap, tile_batch, mirror_axes)
        multiple = backbone.size_multiple
        if tile_size is not None and any(s < 1 or s % m for s, m in zip(tile_size, multiple, strict=True)):
            raise UserError(
                f"module.tile_size is {list(tile_size)}; the backbone needs a multiple of {by_text(multiple)}"
            )
        head = build(DETECTORS, detector, "module.detector", levels=backbone.levels, num_classes=len(classes))
        check_promises(head, Detector, "detector")
        if getattr(head, "one_size", False) and tuple(tile_size or patch_size) != tuple(patch_size):
            raise UserError(
                f"module.tile_size is {list(tile_size or ())}; {detector['name']} predicts boxes as parts of its image "
                f"and needs tiles of the training patch, {by_text(patch_size)}: set module.tile_size=null"
            )
        super().__init__(backbone, head, "detector", note, optimizer, schedule, warmup_steps, ema, finetune, swa)
        self.classes = list(classes)
        self.mirror_classes = dict(mirror_classes)
        self.tile_size = tuple(patch_size if tile_size is None else tile_size)
        self.overlap = overlap
        self.tile_batch = tile_batch
        self.mirror_axes = tuple(mirror_axes)
        self.unswept = Merging(**(merging or {}))
        self.merging = Merging(**note["inference"]["merging"]) if "inference" in note else self.unswept
        self.precision = short_precision(note.get("precision", "32"))
        self.metric = DetectionMetric(self.classes)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        features = self.backbone(batch["image"])
        targets = {"targets": batch} if getattr(self.detector, "needs_targets", False) else {}
        outputs = self.detector(features, batch["image"].shape[2:], **targets)
        with torch.autocast(batch["image"].device.type, enabled=False):
            losses = self.detector.loss(outputs, batch)
        return self.finish_losses(losses, batch, "train")

    def predict_case(self, data: Any, case_id: str) -> tuple[Tensor, Case, list[TileDetections]]:
        """A whole case, in its cached voxels: its image, what its store knows of it, and its boxes, not merged yet.

        Args:
            data: the `DataModule` that has the case.
            case_id: of the case.

        Raises:
            UserError: the network gives NaN; names the case.
        """
        image, case = data.volume(case_id)
        try:
            return image, case, self.predict_views(image, data.pad_value(case_id))
        except UserError as error:
            raise UserError(f"case {case_id}: {error}") from error

    @torch.no_grad()
    def predict_views(self, image: Tensor, pad_value: tuple[float, ...] = (0.0,)) -> list[TileDetections]:
        """Boxes of a whole volume, not merged yet.

        Args:
            image: (C, X, Y, Z) float32, normalised as the checkpoint's note says; tiles of it go to the device.
            pad_value: (C,) normalised intensity outside the volume.

        Raises:
            UserError: the network gives NaN.
        """
        backbone, detector = self.best_networks()
        broken: list[Tensor] = []  # flags of each batch of tiles, looked at once at the end
        impossible: list[Tensor] = []

        def predict_patches(patches: Tensor) -> list[Detections]:
            with self._autocast():
                outputs = detector(backbone(patches), patches.shape[2:])
            broken.extend(v.isnan().any() for v in outputs.values() if isinstance(v, Tensor) and v.is_floating_point())
            with torch.autocast(patches.device.type, enabled=False):
                found = detector.predict(outputs, patches.shape[2:])
            impossible.append(check_detections(found, len(patches), len(self.classes), detector))
            return found

        index = {name: position for position, name in enumerate(self.classes)}
        views = predict_views(
            predict_patches,
            image,
            self.tile_size,
            overlap=self.overlap,
            batch_size=self.tile_batch,
            pad_value=pad_value,
            mirror_axes=self._mirrored(),
            mirror_classes={index[a]: index[b] for a, b in self.mirror_classes.items() if a in index},
            device=self.device,
        )
        is_broken, is_impossible = torch.stack([torch.stack(flags).any() for flags in (broken, impossible)]).tolist()
        if is_broken:
            raise UserError(f"the network's outputs are NaN in precision {self.precision}; are its weights finite?")
        if is_impossible:
            raise UserError(
                f"{type(detector).__name__}.predict gives scores outside [0, 1], labels outside 0 to "
                f"{len(self.classes) - 1} or boxes that end before they start ({CONTRACTS})"
            )
        return views

    def _mirrored(self) -> tuple[int, ...]:
        """The axes of the mirrored views; not left to right where that would exchange classes with nothing."""
        unpaired = unpaired_sides(self.classes, self.mirror_classes)
        if LATERAL_AXIS not in self.mirror_axes or not unpaired:
            return self.mirror_axes
        warnings.warn(
            f"no view is mirrored along axis 0 (left-right): {', '.join(unpaired)} without a counterpart in "
            "mirror_classes",
            stacklevel=2,
        )
        return tuple(axis for axis in self.mirror_axes if axis != LATERAL_AXIS)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype=dtype) if dtype is not None else nullcontext()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """One whole case of the validation fold, against its boxes in cached voxels."""
        self.check_pending()  # a NaN loss is the cause, NaN outputs are only what follows
        trainer: Any = self.trainer
        datamodule = trainer.datamodule
        case_id = batch["case_id"]
        if case_id == NO_CASE:
            return {}
        _, case, views = self.predict_case(datamodule, case_id)
        self.metric.update(
            datamodule.val_ids.index(case_id),
            merge(views, self.merging),
            torch.as_tensor(case.boxes),
            torch.as_tensor(case.labels),
            case.annotated,
        )
        return {}

    def on_validation_epoch_end(self) -> None:
        values = self.metric.compute()
        self.metric.reset()
        for key, value in values.items():
            self.log(f"val/{key}", value, prog_bar=key == "mAP", rank_zero_only=False)

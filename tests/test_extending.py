"""The examples of docs/extending.md, as they stand there, in the registries that they name, run as a user would."""

from __future__ import annotations

import functools
import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml

from pretrain3d.__main__ import main
from pretrain3d.backbones.contract import Level

CONFIGS = Path("configs").resolve()
EXTENDING = Path("docs/extending.md")
BLOCK = re.compile(r'```python\n# "(\w+)": "([\w.]+):(\w+)" in (?:\w+ of )?([\w/]+)/__init__.py\n(.*?)```', re.DOTALL)
REGISTRY = {
    "backbones": "BACKBONES", "objectives": "PRETRAINING", "detection": "DETECTORS", "data/readers": "READERS",
    "modules": "FINETUNE",
}  # fmt: skip
STEPS = [
    "data.patch_size=[32,32,32]", "data.batch_size=2", "data.num_workers=0", "data.num_folds=2",
    "+data.num_val_patches=2", "module.warmup_steps=0", "trainer.val_every_n_steps=2",
    "trainer.checkpoint_every_n_steps=1", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu",
]  # fmt: skip


PARTS = {
    "pretrain": ("backbone=tiny_conv", "module.method={name: denoise}"),
    "detect": ("backbone=tiny_conv", "module.detector={name: centres}"),
}


@pytest.fixture(scope="module")
def examples():
    """Registers every example; yields their names."""
    names = []
    with pytest.MonkeyPatch.context() as patch:
        for name, module, attribute, room, code in BLOCK.findall(EXTENDING.read_text("utf-8")):
            registry = getattr(importlib.import_module(f"pretrain3d.{room.replace('/', '.')}"), REGISTRY[room])
            assert name not in registry and module.startswith(f"pretrain3d.{room.replace('/', '.')}.")
            made = ModuleType(module)
            patch.setitem(sys.modules, module, made)
            exec(compile(code, f"docs/extending.md: {name}", "exec"), made.__dict__)
            patch.setitem(registry, name, f"{module}:{attribute}")
            names.append(name)
        yield names


@pytest.fixture(scope="module")
def store(examples, tmp_path_factory):
    """Eight patients, six of them with a bright block that was drawn, through the example of a reader."""
    folder, draws = tmp_path_factory.mktemp("extending"), np.random.default_rng(0)
    for patient in range(8):
        image, mask = draws.normal(0, 20, (40, 36, 32)).astype(np.int16), np.zeros((40, 36, 32), np.uint8)
        x, y, z = draws.integers(2, 20, 3)
        mask[x : x + 8, y : y + 7, z : z + 6] = 1
        image[mask > 0] += 300
        path = folder / "raw" / f"p{patient}"
        path.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(image, np.diag([2.0, 2, 2, 1])), path / "ct.nii.gz")
        if patient < 6:
            nibabel.save(nibabel.Nifti1Image(mask, np.diag([2.0, 2, 2, 1])), path / "lesions.nii.gz")
    assert main(["prepare", str(folder / "raw"), f"out={folder / 'store'}", "reader=folders", "workers=1"]) == 0
    return folder / "store"


def fit(config, name, store, *more, steps=2):
    out = store.parent
    line = ["fit", "--config", str(config), f"name={name}", f"out={out}", f"data.store={store}", *STEPS, *more]
    assert main([*line, f"trainer.max_steps={steps}"]) == 0
    return out / name


def test_every_kind_of_part_has_an_example(examples):
    assert examples == ["tiny_conv", "denoise", "invariance", "centres", "folders", "late"]


def test_a_method_restores_resumes_and_is_tested(store, capsys):
    text = re.search(r"```yaml\n# configs/pretrain/denoise.yaml\n(.*?)```", EXTENDING.read_text("utf-8"), re.S)
    assert text is not None
    config = yaml.safe_load(text[1]) | {"base": str(CONFIGS / "pretrain/base.yaml")}
    path = store.parent / "denoise.yaml"
    path.write_text(yaml.safe_dump(config))
    run = fit(path, "denoise", store, "backbone=tiny_conv")
    fit(path, "denoise", store, "backbone=tiny_conv", steps=3)
    assert main(["test", str(run), "split=val", "samples=10", "patches=1"]) == 0
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    assert {"network", "copy", "network/copy"} <= metrics.keys()
    assert metrics["copy"]["value"] == pytest.approx(0.25, rel=0.05)  # sigma squared
    capsys.readouterr()
    assert main(["table", str(run)]) == 0
    assert "network : copy" in capsys.readouterr().out
    assert len(list((run / "pictures").glob("*_restored.png"))) > 0


def test_a_method_compares_views(store):
    run = fit(CONFIGS / "pretrain/simclr.yaml", "invariance", store, "backbone=tiny_conv",
              "module.method={name: invariance, crop_size: 16, width: 8}")  # fmt: skip
    assert (run / "checkpoints" / "last.ckpt").is_file()


def test_a_detector_is_planned_trained_tested_and_predicts(store, tmp_path):
    assert main(["plan", str(store), "backbone=tiny_conv", "detector=centres"]) == 0
    source = fit(
        CONFIGS / "pretrain/base.yaml", "mae", store, "backbone=tiny_conv", "trainer.probe_every_n_validations=0"
    )
    assert main(["export", str(source), f"out={tmp_path / 'mae.pt'}"]) == 0
    more = ["module.finetune.name=late", "module.ema=null", f"transfer.path={tmp_path / 'mae.pt'}"]
    run = fit(CONFIGS / "detect/base.yaml", "detector", store, *PARTS["detect"], *more, steps=4)
    assert main(["sweep", str(run)]) == 0
    assert main(["test", str(run), "split=val", "samples=10", "pictures=0"]) == 0
    assert json.loads((run / "result.json").read_text())["backbone"]["init"] == "mae"
    image = store.parent / "raw" / "p7" / "ct.nii.gz"
    assert main(["predict", str(run), str(image), f"out={tmp_path / 'found'}", "threshold=0"]) == 0
    rates = [row.split(",")[1] for row in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert float(rates[0]) == 0.0 < float(rates[1])


def of(module: str, attribute: str) -> Any:
    return getattr(sys.modules[f"pretrain3d.{module}"], attribute)


def lacks(attribute):
    """Its objects lose an attribute."""

    def wrong(self, plain, *args, **kwargs):
        plain(self, *args, **kwargs)
        delattr(self, attribute)

    return "__init__", wrong


def declares(levels):
    """Its levels are others than what it gives."""

    def wrong(self, plain, *args, **kwargs):
        plain(self, *args, **kwargs)
        self.levels = levels(self.levels)
        self.size_multiple = self.levels[-1].stride

    return "__init__", wrong


def gives(method, change):
    """What a method gives is changed."""
    return method, lambda self, plain, *args, **kwargs: change(plain(self, *args, **kwargs))


def predicts(**changes):
    """Boxes, scores or labels are changed."""

    def change(found):
        return [replace(one, **{key: to(getattr(one, key)) for key, to in changes.items()}) for one in found]

    return gives("predict", change)


def coarser(levels):
    return tuple(Level(level.channels, tuple(2 * s for s in level.stride)) for level in levels)


CONV, DENOISE = ("backbones.tiny_conv", "TinyConv"), ("objectives.denoise", "Denoise")
INVARIANCE, CENTRES = ("objectives.invariance", "Invariance"), ("detection.centres", "Centres")
FOLDERS = ("data.readers.folders", "Folders")
BROKEN = {
    "no size": (CONV, lacks("size_multiple"), "the backbone TinyConv lacks size_multiple"),
    "no arguments": (CONV, lacks("arguments"), "the backbone TinyConv lacks arguments"),
    "strides": (
        CONV,
        declares(coarser),
        "TinyConv gives [(2, 8, 16, 16, 16), (2, 16, 8, 8, 8), ",
    ),
    "order": (
        CONV,
        declares(lambda levels: levels[::-1]),
        "its level of stride (8, 8, 8) is followed by one of ",
    ),
    "one tensor": (CONV, gives("forward", lambda found: found[-1]), "the backbone TinyConv gives Tensor for an image"),
    "no total": (DENOISE, gives("loss", lambda found: {"mse": found["loss"]}), "Denoise.loss gives the keys mse;"),
    "a float": (DENOISE, gives("loss", lambda found: {**found, "part": 3.0}), "Denoise.loss gives part a float;"),
    "a row": (DENOISE, gives("loss", lambda found: {"loss": found["loss"][None]}), "gives loss of shape (1,);"),
    "one image": (CENTRES, gives("predict", lambda found: found[:1]), "Centres.predict gives 1 x Detections for 4"),
    "tuples": (
        CENTRES,
        gives("predict", lambda found: [(one.boxes,) for one in found]),
        "gives 4 x tuple for 4",
    ),
    "types": (CENTRES, predicts(labels=lambda labels: labels.int()), "gives labels of torch.int32; expected int64"),
    "scores": (CENTRES, predicts(scores=lambda scores: scores + 1), "Centres.predict gives scores outside [0, 1]"),
    "labels": (CENTRES, predicts(labels=lambda labels: labels + 1), "labels outside 0 to 0"),
    "boxes": (CENTRES, predicts(boxes=lambda boxes: -boxes), "boxes that end before they start"),
}


def break_it(monkeypatch, part, change):
    """Puts a wrong method in the place of an example's."""
    (method, wrong), target = change, of(*part)
    plain = getattr(target, method)

    @functools.wraps(plain)
    def broken(self, *args, **kwargs):
        return wrong(self, plain, *args, **kwargs)

    monkeypatch.setattr(target, method, broken)


@pytest.mark.parametrize("case", BROKEN)
def test_a_part_that_breaks_its_contract_is_named_in_one_line(case, store, monkeypatch, capsys, tmp_path):
    part, change, said = BROKEN[case]
    break_it(monkeypatch, part, change)
    kind = "pretrain" if part == DENOISE else "detect"
    line = ["fit", "--config", str(CONFIGS / kind / "base.yaml"), "name=x", f"out={tmp_path}", f"data.store={store}"]
    capsys.readouterr()
    assert main([*line, *STEPS, *PARTS[kind], "trainer.max_steps=2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pretrain3d: error: ") and said in error and "docs/extending.md" in error


def test_methods_without_what_their_module_calls_are_named(examples, store, monkeypatch, capsys):
    views = ["fit", "--config", str(CONFIGS / "pretrain/simclr.yaml"), f"data.store={store}", "name=x", *STEPS,
             "backbone=tiny_conv", "module.method={name: invariance, crop_size: 16}"]  # fmt: skip
    assert main([*views, "data.patch_size=[8,8,8]"]) == 2
    assert "cuts crops of 16 x 16 x 16 out of data.patch_size [8, 8, 8], into which" in capsys.readouterr().err
    monkeypatch.delattr(of(*INVARIANCE), "after_step")
    assert main(views) == 2
    assert "not contrastive, as it has no after_step()" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.delattr(of(*DENOISE), "pictures")
    assert main(["fit", "--config", str(CONFIGS / "pretrain/base.yaml"), f"data.store={store}", "name=x", *STEPS,
                 *PARTS["pretrain"]]) == 2  # fmt: skip
    assert "the method Denoise lacks pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"annotated": (0,), "instances": None}, "annotated names the classes (0,), but instances is None"),
        ({"labels": {9: 0}}, "those that labels names [9]"),
        ({"instances": np.zeros((2, 2, 2), np.uint8)}, "instances has the shape (2, 2, 2), the image (1, 40, 36, 32)"),
    ],
)
def test_a_volume_that_no_reader_may_give_is_named(change, said, store, monkeypatch, capsys, tmp_path):
    break_it(monkeypatch, FOLDERS, gives("read", lambda volume: replace(volume, **change)))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "p0").symlink_to(store.parent / "raw" / "p0")
    assert main(["prepare", str(tmp_path / "raw"), f"out={tmp_path / 'store'}", "reader=folders", "workers=1"]) == 2
    assert said in capsys.readouterr().err


def test_a_reader_without_an_attribute_is_named(store, monkeypatch, capsys, tmp_path):
    break_it(monkeypatch, FOLDERS, lacks("licence"))
    assert main(["prepare", str(store.parent / "raw"), f"out={tmp_path / 'x'}", "reader=folders"]) == 2
    assert "the reader Folders lacks licence" in capsys.readouterr().err

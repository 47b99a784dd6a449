"""`test` of a pretraining by reconstruction: held-out errors against loops, and their way into table and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_store import tiny_store

from pretrain3d.__main__ import main
from pretrain3d.backbones.transfer import load_export
from pretrain3d.commands import reconstruction
from pretrain3d.config import read_yaml
from pretrain3d.data.leakage import Corpus
from pretrain3d.data.store import Store
from pretrain3d.evaluation.reconstruction import summarise
from pretrain3d.objectives import inpainting
from pretrain3d.reporting.results import read_result
from pretrain3d.reporting.run_folder import RunFolder

TINY = [
    "data.pool=train", "data.patch_size=[16,16,16]", "data.batch_size=2", "data.num_workers=0", "data.intensity=null",
    "+data.num_val_patches=2", "backbone={name: resenc, channels: [4, 8], blocks: [1, 1], strides: [1, 2]}",
    "module.warmup_steps=0", "trainer.max_steps=1", "trainer.val_every_n_steps=1",
    "trainer.checkpoint_every_n_steps=1", "trainer.accelerator=cpu", "trainer.probe_every_n_validations=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny_store(folder / "store")
    return folder


def fit(out: Path, method: str) -> Path:
    if not (out / method).exists():
        line = ["fit", "--config", f"configs/pretrain/phantom_{method}.yaml", f"name={method}", f"out={out}"]
        assert main([*line, f"data.store={out / 'store'}", *TINY]) == 0
    return out / method


def test_summary_by_loops() -> None:
    rng = np.random.default_rng(0)
    groups = ["a", "a", "b", "c", "d", "e", "f"]
    rows = [{"network": net, "mean_predictor": net + more} for net, more in rng.random((7, 2))]
    found = summarise(rows, groups, samples=4000)
    net, mean = (np.array([row[name] for row in rows]) for name in ("network", "mean_predictor"))
    assert found["network"]["value"] == pytest.approx(net.mean())
    assert found["network/mean_predictor"]["value"] == pytest.approx(net.mean() / mean.mean())
    names = sorted(set(groups))
    values, ratios = [], []
    for _ in range(4000):
        chosen = [row for name in rng.choice(names, len(names)) for row, g in enumerate(groups) if g == name]
        values.append(net[chosen].mean())
        ratios.append(net[chosen].mean() / mean[chosen].mean())
    for key, samples in (("network", values), ("network/mean_predictor", ratios)):
        expected = np.quantile(samples, [0.025, 0.975])
        assert [found[key]["low"], found[key]["high"]] == pytest.approx(expected, abs=0.03), key
    for few in (summarise(rows[:1], ["a"], samples=0), summarise(rows[:1], ["a"]), summarise(rows[:2], ["a", "a"])):
        assert few["network"]["low"] is few["network"]["high"] is None and few["network"]["value"] > 0


def test_held_out_errors_by_loops(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(out, "mae")
    assert main(["test", str(run), "split=val", "patches=3", "samples=20"]) == 0
    assert "mae, mean squared error: network " in capsys.readouterr().out
    result = read_result(run)
    module, data = reconstruction.load_run(RunFolder(run), "last", "reconstruction")
    assert [row["case"] for row in result["cases"]] == data.val_ids and not set(data.val_ids) & set(data.train_ids)
    assert result["leakage"] == [] and result["asked"]["patches"] == 3 and result["data"]["cases"] == len(data.val_ids)
    for number, row in enumerate(result["cases"]):
        batch = data.fixed_patches(row["case"], 3 * number, 3)
        assert batch["case_ids"] == [row["case"]] * 3 and batch["sample_index"] == [3 * number + k for k in range(3)]
        prepared = module.prepare(module.method, batch, "val")
        prediction = module.method(module.backbone, prepared)["reconstruction"].detach()
        image, keep, inside = batch["image"], prepared["keep"], batch["inside"]
        filled = inpainting.linear(image, keep & inside)
        errors: dict[str, list[float]] = {"network": [], "mean_predictor": [], "inpainting_linear": []}
        for patch in range(3):
            hidden, seen = (~keep & inside)[patch, 0], (keep & inside)[patch, 0]
            for channel in range(image.shape[1]):
                truth = image[patch, channel]
                guesses = {
                    "network": prediction[patch, channel],
                    "mean_predictor": truth[seen].mean(),
                    "inpainting_linear": filled[patch, channel],
                }
                for name, guess in guesses.items():
                    errors[name] += (guess - truth)[hidden].square().tolist()
        for name, values in errors.items():
            assert row[name] == pytest.approx(np.mean(values), rel=1e-4), name
    for name in errors:
        expected = np.mean([row[name] for row in result["cases"]])
        assert result["metrics"][name]["value"] == pytest.approx(expected), name


def test_the_same_weights_give_the_same_numbers(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(out, "mae")
    line = ["test", str(run), "patches=1", "samples=20"]
    assert main(line) == 0
    first = read_result(run)
    assert [row["case"] for row in first["cases"]] == ["test_0"]
    assert main(line) == 0
    assert "is of these weights already" in capsys.readouterr().out
    (run / "result.json").unlink()
    assert main(line) == 0
    assert read_result(run)["metrics"] == first["metrics"] and read_result(run)["cases"] == first["cases"]


def test_what_earlier_weights_have_seen_is_a_leak(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that went on from weights whose corpus holds a test case; none of its own cases is a held-out one."""
    run = fit(out, "mae")
    assert main(["test", str(run), "patches=1", "samples=0", "split=val"]) == 0
    assert read_result(run)["leakage"] == []
    path = run / "checkpoints" / "last.ckpt"
    before, content = path.read_bytes(), torch.load(path, weights_only=True)
    store = Store(out / "store")
    content["pretrain3d"]["pretrained_on"] = Corpus.of(store, ["test_0"]).to_dict()
    torch.save(content, path)
    capsys.readouterr()
    assert main(["test", str(run), "patches=1", "samples=0"]) == 0
    path.write_bytes(before)
    assert read_result(run)["leakage"] == [
        {"case": "test_0", "split": "test", "how": "same voxels", "similarity": None}
    ]
    said = capsys.readouterr().err
    assert "1 test cases: test_0 (same voxels)" in said
    assert "result.json of checkpoint=last, split=val is replaced" in said


def test_table_report_and_show(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(out, "mae")
    assert main(["test", str(run), "split=val", "patches=1", "samples=20"]) == 0
    entry = read_result(run)["metrics"]["inpainting_linear"]
    cell = f"{entry['value']:.3f}"
    files = {name: out / name for name in ("table.md", "report.html")}
    capsys.readouterr()
    assert main(["table", str(run), f"out={files['table.md']}", f"report={files['report.html']}"]) == 0
    assert "reconstruction, held-out patches: tiny" in capsys.readouterr().out
    for text in (files["table.md"].read_text(encoding="utf-8"), files["report.html"].read_text(encoding="utf-8")):
        assert "tri-linear in-painting" in text and cell in text and "mean squared error" in text
        assert "mAP" not in text.split("What was run")[0], "no table of detection"
    assert main(["show", str(run)]) == 0
    assert "inpainting_linear" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "measure"), [("swin_mix", "mean absolute error"), ("models_genesis", "mean squared")]
)
def test_methods_that_restore_the_whole_patch(out: Path, method: str, measure: str) -> None:
    run = fit(out, method)
    assert main(["test", str(run), "patches=2", "samples=20"]) == 0
    result = read_result(run)
    assert result["asked"]["measure"] == f"mean {'absolute' if method == 'swin_mix' else 'squared'} error"
    assert "inpainting_linear" not in result["metrics"]
    assert ("copy" in result["metrics"]) == (method == "models_genesis")
    assert 0 < result["metrics"]["network"]["value"] < 1e3 and result["metrics"]["mean_predictor"]["value"] > 0


def test_mistakes(out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["test", str(fit(out, "volume_fusion"))]) == 2
    assert "volume_fusion, which restores no intensities" in capsys.readouterr().err
    run = str(fit(out, "mae"))
    for option, message in (("patches=0", "patches=0: it must be 1 or more"), ("split=train", "it is test or val"),
                            ("pictures=1", "unknown option 'pictures'")):  # fmt: skip
        assert main(["test", run, option]) == 2
        assert message in capsys.readouterr().err
    loaded: Any = reconstruction.load_run

    def without_test(*arguments: Any) -> tuple[Any, Any]:
        module, data = loaded(*arguments)
        data.test_ids = []
        return module, data

    monkeypatch.setattr(reconstruction, "load_run", without_test)
    assert main(["test", run, "patches=1"]) == 2
    assert "hold no test case; split=val" in capsys.readouterr().err


def test_the_experiments_test_every_run_that_they_tabulate() -> None:
    for name in ("demo", "openkbp"):
        stages = [stage["run"].split() for stage in read_yaml(Path(f"experiments/{name}.yaml"))["stages"]]
        tested = {word.removeprefix("out=") for words in stages if words[0] == "test" for word in words[1:]}
        tabulated = {word for words in stages if words[0] == "table" for word in words[1:] if "=" not in word}
        assert tabulated and tabulated <= tested


def test_several_sets_normalised_as_the_weights_were(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`data.intensity=pretrained` is one normalisation for all sets, whatever their plans say, in `test` too."""
    tiny_store(tmp_path / "other")
    plan = tmp_path / "other" / "plan.yaml"
    plan.write_text(plan.read_text().replace("low: -200", "low: -300"))
    weights = tmp_path / "weights.pt"
    assert main(["export", str(fit(out, "mae")), f"out={weights}"]) == 0
    line = ["fit", "--config", "configs/pretrain/phantom_mae.yaml", "name=two", f"out={tmp_path}",
            f"data.store=[{out / 'store'},{tmp_path / 'other'}]", *TINY, "data.intensity=pretrained"]  # fmt: skip
    assert main(line) == 2
    assert "takes the normalisation of transfer.path, which is not given" in capsys.readouterr().err
    assert main([*line, f"transfer.path={weights}"]) == 0
    note = torch.load(tmp_path / "two" / "checkpoints" / "last.ckpt", weights_only=True)["pretrain3d"]
    expected = load_export(weights)["preprocessing"]["intensity"]
    assert [part["preprocessing"]["intensity"] for part in note["sets"].values()] == [expected, expected]
    assert main(["test", str(tmp_path / "two"), "split=val", "patches=1", "samples=0"]) == 0
    assert {row["case"].split("/")[0] for row in read_result(tmp_path / "two")["cases"]} == {"tiny", "tiny_2"}

"""`pretrain3d score` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_matching import random_cases

from pretrain3d.__main__ import main
from pretrain3d.evaluation.matching import match
from pretrain3d.evaluation.protocol import KEYS, evaluate
from pretrain3d.evaluation.scorefile import write
from pretrain3d.evaluation.statistics import bootstrap


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    predictions, targets = random_cases(0, cases=8, boxes=20, objects=4, classes=2)
    write(tmp_path / "p.json", ["liver lesion", "nodule"], predictions)
    write(tmp_path / "t.json", ["liver lesion", "nodule", "absent"], targets)
    return f"predictions={tmp_path / 'p.json'}", f"targets={tmp_path / 't.json'}"


def test_table_and_file(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["score", *files, f"out={out}", "samples=50"]) == 0
    predictions, targets = random_cases(0, cases=8, boxes=20, objects=4, classes=2)
    expected = evaluate(predictions, targets, ["liver lesion", "nodule", "absent"])
    written = json.loads(out.read_text())
    for key in KEYS:
        assert written[key] == pytest.approx(expected[key]) and isinstance(written[key], float)
        assert written["per_class"]["nodule"][key] == pytest.approx(expected["per_class"]["nodule"][key])
        assert written["per_class"]["absent"][key] is None and written["intervals"]["per_class"]["absent"][key] is None
        low, high = written["intervals"][key]
        assert low <= written[key] <= high
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].split() == ["objects", "mAP", "AP@0.10", "AP@0.50", "FROC@0.10", "FROC@0.50"]
    assert f"{expected['mAP']:.3f} [" in lines[1] and lines[2].startswith("liver lesion") and "8 cases" in text
    assert lines[4].split() == ["absent", "0", "-", "-", "-", "-", "-"]


def test_sizes_patients_and_a_case_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions, targets = random_cases(0, cases=8, boxes=20, objects=4, classes=2)
    for index, entry in enumerate(targets.values()):
        entry.update(spacing_mm=[1, 1, 2], group=f"patient {index // 2}")  # type: ignore[call-overload]
    write(tmp_path / "p.json", ["a", "b"], predictions)
    write(tmp_path / "t.json", ["a", "b"], targets)
    table = tmp_path / "cases.tsv"
    table.write_text("case\tsite\n" + "".join(f"{case}\t{'NS'[i % 2]}\n" for i, case in enumerate(targets)))
    out = tmp_path / "out.json"
    files = [f"predictions={tmp_path / 'p.json'}", f"targets={tmp_path / 't.json'}", f"out={out}", "samples=30"]
    assert main(["score", *files, "sizes=[500, 2000]", f"cases={table}", "by=site"]) == 0
    written = json.loads(out.read_text())
    groups = {case: f"patient {index // 2}" for index, case in enumerate(targets)}
    expected = bootstrap(match(predictions, targets, ["a", "b"]), samples=30, groups=groups)["metrics"]["mAP"]
    assert [written["mAP"], *written["intervals"]["mAP"]] == pytest.approx(list(expected.values()))
    assert list(written["by_size"]) == ["0-500", "500-2000", "2000-"]
    assert sum(row["objects"] for row in written["by_size"].values()) == sum(len(t["labels"]) for t in targets.values())
    south = [case for index, case in enumerate(targets) if index % 2]
    alone = evaluate({i: predictions[i] for i in south}, {i: targets[i] for i in south}, ["a", "b"])
    assert written["by"]["site"]["S"]["mAP"] == pytest.approx(alone["mAP"])
    assert written["by"]["site"]["S"]["num_cases"] == 4
    assert set(written["curves"]["froc_per_class"]) == {"a", "b"}
    shown = capsys.readouterr().out
    for text in ("by site", "by size in mm3", "500-2000", "95 % intervals over patients", "cases without: AUROC"):
        assert text in shown
    for arguments, said in [
        (["sizes=[5,3]"], "expected ascending volumes"),
        (["sizes=big"], "expected ascending volumes"),
        (["sizes=[.nan]"], "expected ascending volumes"),
        (["sizes=[.inf]"], "expected ascending volumes"),
        ([f"sizes=[1{'0' * 400}]"], "expected ascending volumes"),
        (["by=site"], "by=site needs cases=TABLE as well"),
        ([f"cases={table}", "by=scanner"], "no column 'scanner'"),
    ]:
        assert main(["score", *files, *arguments]) == 2
        assert said in capsys.readouterr().err


def test_mistakes_are_one_line_and_status_2(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in [
        ([files[0]], "missing targets=VALUE"),
        ([*files, "sample=3"], "did you mean 'samples'"),
        ([*files, "samples=-1"], "samples=-1"),
        ([*files, "boxes.json"], "boxes.json"),
        ([*files, f"out={tmp_path}"], "is a folder; expected the name of a file"),
        ([*files, f"out={tmp_path / 'p.json' / 'x.json'}"], "p.json is a file"),
        ([*files, "sizes=[9]"], "case 'case0' has no spacing_mm"),
        ([files[0], f"targets={tmp_path / 'none.json'}"], "none.json"),
    ]:
        assert main(["score", *arguments]) == 2
        captured = capsys.readouterr()
        assert said in captured.err and len(captured.err.splitlines()) == 1 and not captured.out


def test_it_does_not_import_torch(files: tuple[str, str]) -> None:
    code = f"""import sys
from pretrain3d.__main__ import main
main(["score", *{files!r}, "samples=10"])
print(sorted({{"torch", "lightning", "monai"}} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"

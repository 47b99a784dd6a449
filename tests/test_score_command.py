"""`pretrain3d score` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_matching import random_cases

from pretrain3d.__main__ import main
from pretrain3d.evaluation.protocol import KEYS, evaluate
from pretrain3d.evaluation.scorefile import write


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


def test_mistakes_are_one_line_and_status_2(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in [
        ([files[0]], "missing targets=VALUE"),
        ([*files, "sample=3"], "did you mean 'samples'"),
        ([*files, "samples=-1"], "samples=-1"),
        ([*files, "boxes.json"], "boxes.json"),
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

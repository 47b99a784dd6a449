"""What is built from the sources: the wheel holds the configurations and runs without a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.mark.slow
def test_the_wheel_holds_the_configurations(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="building without the network needs setuptools here")
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = "import setuptools.build_meta as backend; print(backend.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    ours = {file.relative_to(ROOT) for file in (ROOT / "configs").rglob("*.yaml")}
    package = tmp_path / "installed" / "pretrain3d"
    assert ours and {file.relative_to(package) for file in (package / "configs").rglob("*.yaml")} == ours

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-m", "pretrain3d", "show", "configs/detect/phantom.yaml", "seed=5"]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "-s5\n" in done.stdout
    where = "import pretrain3d.config as c; print(c.find_config('configs/detect/phantom.yaml'))"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(package / "configs/detect/phantom.yaml")

"""The rooms of docs/design.md section 1, read from the imports: who may import whom, and which library where."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pretrain3d

ROOT = Path(pretrain3d.__file__).parent

# From the lowest up. Rooms on one line do not see each other.
LAYERS = (
    ("__init__",),
    ("signatures",),
    ("config", "files"),
    ("registry", "delimited"),
    ("options",),
    ("devices", "parallel", "sparse"),
    ("boxes",),
    ("geometry",),
    ("data", "backbones", "objectives", "evaluation"),
    ("detection",),
    ("modules",),
    ("planning", "reporting"),
    ("api",),
    ("commands",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# A library, and the files (or folders) that may import it.
HELD = {
    "wandb": ("reporting/wandb_logger",),
    "SimpleITK": ("data/readers/itk",),
    "omegaconf": ("config",),
    "lightning": (
        "data/module",
        "modules",
        "reporting/callbacks",
        "reporting/checkpoints",
        "reporting/csv_logger",
        "reporting/throughput",
        "reporting/wandb_logger",
        "commands",
    ),
    "pytorch_lightning": (),
}
REGISTRIES = {
    "backbones": "BACKBONES",
    "objectives": "PRETRAINING",
    "detection": "DETECTORS",
    "modules": "MODULES",
    "data.readers": "READERS",
}


def files() -> list[Path]:
    return sorted(file for file in ROOT.rglob("*.py") if "configs" not in file.relative_to(ROOT).parts)


def imports(source: str, package: str) -> Iterator[str]:
    """Dotted names of all that a file of ``package`` imports, in functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def offence(file: str, imported: str) -> str | None:
    """Why ``file`` (relative to the package, without ending) may not import ``imported``; None when it may."""
    room = file.split("/")[0]
    top, _, rest = imported.partition(".")
    if top == "pretrain3d":
        other = rest.split(".")[0] if rest.split(".")[0] in LEVEL else "__init__"
        if other != room and LEVEL[other] >= LEVEL[room]:
            return f"{file} imports {imported}: {other} is not below {room}"
    elif top in HELD and not any(file == holder or file.startswith(f"{holder}/") for holder in HELD[top]):
        return f"{file} imports {imported}: only {', '.join(HELD[top]) or 'nobody'} may"
    return None


def test_every_file_has_a_room() -> None:
    rooms = {file.relative_to(ROOT).with_suffix("").parts[0] for file in files()}
    assert rooms <= set(LEVEL), f"not in LAYERS: {sorted(rooms - set(LEVEL))}"


def test_imports_follow_the_layers() -> None:
    offences = []
    for file in files():
        name = file.relative_to(ROOT).with_suffix("").as_posix()
        package = ".".join(["pretrain3d", *file.relative_to(ROOT).parts[:-1]])
        found = (offence(name, imported) for imported in imports(file.read_text(encoding="utf-8"), package))
        offences += [text for text in found if text]
    assert not offences, "\n".join(offences)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("config", "import pretrain3d.boxes"),
        ("boxes", "def f():\n    from pretrain3d.detection import anchors"),
        ("data/store", "from pretrain3d import evaluation"),
        ("data/store", "from ..evaluation import froc"),
        ("planning", "from pretrain3d.reporting import results"),
        ("boxes", "from omegaconf import OmegaConf"),
        ("detection/retina", "import lightning.pytorch as pl"),
        ("reporting/callbacks", "import wandb"),
        ("modules/base", "import pytorch_lightning"),
    ],
)
def test_the_rule_sees_an_offence(file: str, source: str) -> None:
    package = ".".join(["pretrain3d", *file.split("/")[:-1]])
    assert any(offence(file, imported) for imported in imports(source, package))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/store", "from pretrain3d.data.identity import data_hash"),
        ("data/readers/nndet", "from .. import store"),
        ("commands/fit", "import lightning\nfrom pretrain3d import __version__, config, modules"),
        ("modules/base", "import lightning"),
        ("config", "import omegaconf"),
        ("geometry", "import torch, lightning_utilities"),
    ],
)
def test_the_rule_lets_pass(file: str, source: str) -> None:
    package = ".".join(["pretrain3d", *file.split("/")[:-1]])
    assert not [text for imported in imports(source, package) if (text := offence(file, imported))]


@pytest.mark.parametrize("folder", REGISTRIES)
def test_registries_are_plain_and_resolve(folder: str) -> None:
    package = ROOT / folder.replace(".", "/") / "__init__.py"
    body = ast.parse(package.read_text(encoding="utf-8")).body
    statements = "\n".join(ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom))
    heavy = {name.split(".")[0] for name in imports(statements, "")} - sys.stdlib_module_names
    assert not heavy, f"{package} must import nothing of ours or others'"
    registry = getattr(importlib.import_module(f"pretrain3d.{folder}"), REGISTRIES[folder])
    assert registry
    for name, reference in registry.items():
        module, _, attribute = reference.partition(":")
        assert module.startswith(f"pretrain3d.{folder}."), f"{name}: {reference} lies outside {folder}"
        assert callable(getattr(importlib.import_module(module), attribute))


def test_the_command_line_starts_light() -> None:
    """Mistakes are answered before torch is imported; a fresh process, since this one has it."""
    script = """if True:
        import sys
        from pretrain3d.__main__ import main
        assert main(["--help"]) == 0
        assert main(["fti"]) == 2
        assert main(["fit", "--help"]) == 0
        assert main(["fit", "--config", "configs/detect/phantom.yaml", "backbone=resenc_xxl"]) == 2
        assert main(["fit", "--config", "configs/detect/phantom.yaml", "trainer.max_step=1"]) == 2
        heavy = {"torch", "lightning", "monai", "numpy", "scipy", "matplotlib", "wandb"} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[1].startswith("pretrain3d: error: unknown backbone 'resenc_xxl', did you mean ")
    assert done.stderr.count("\n") == 3

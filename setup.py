"""Only what pyproject.toml cannot say: the top-level configs/ travel inside the package of a built wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """`pretrain3d fit --config configs/...` then works without a checkout; an editable install reads the checkout's."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "pretrain3d" / "configs"
            shutil.rmtree(target, ignore_errors=True)  # no file that the checkout has no more
            shutil.copytree("configs", target)


setup(cmdclass={"build_py": BuildWithConfigs})

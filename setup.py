"""The embedded models go into the wheel, as preftune/assets/tiny; pyproject.toml says the rest."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ASSETS = Path("assets", "tiny")
PARTS = ("pipeline", "imagereward", "pretrained", "images", "prompts.txt", "held_out.txt", "README.md")
"""What programs read; the scripts that made it stay in the repository."""


class BuildWithAssets(build_py):
    """Copies the embedded models; an editable install finds them in the repository."""

    def run(self) -> None:
        """Build the packages, then copy."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "preftune", ASSETS)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in PARTS:
            if (ASSETS / name).is_dir():
                shutil.copytree(ASSETS / name, target / name)
            else:
                shutil.copy2(ASSETS / name, target)


setup(cmdclass={"build_py": BuildWithAssets})

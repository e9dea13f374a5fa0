"""What pyproject.toml cannot say: a wheel carries the recipes, and the C++ kernels where HFQUANT_COMPILED_WHEEL is set.

`make wheel` sets it. Any other build needs neither torch nor a compiler; the kernels are then compiled when they are
first used.
"""

import os
import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.install_lib import install_lib


class PlatformDistribution(Distribution):
    """A distribution for one platform."""

    def has_ext_modules(self) -> bool:
        """Return True: wheels are named for the platform, and installed where its libraries are."""
        return True


class AnyPythonWheel(bdist_wheel):
    """A wheel for every Python: the library knows libtorch alone."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


class WithRecipes(build_py):
    """Copies the recipes, which lie beside the package, into it."""

    def run(self) -> None:
        """Put the package in place, and the recipes into it."""
        super().run()
        if not self.editable_mode:
            for recipe in Path("recipes").glob("*.yaml"):
                self.copy_file(str(recipe), str(Path(self.build_lib, "hfquant", "recipes", recipe.name)))


class WithKernels(install_lib):
    """Compiles into the wheel; a library in the source tree or in build/ would outlive its sources."""

    def run(self) -> None:
        """Put the package in place, and the library beside its sources."""
        super().run()
        # By path, since importing hfquant would import all that it depends on.
        build = runpy.run_path("hfquant/kernels/cpu/build.py")
        build["compile_library"](Path(self.install_dir).absolute() / "hfquant/kernels/cpu" / build["wheel_name"]())


commands: dict[str, type] = {"build_py": WithRecipes}
if os.environ.get("HFQUANT_COMPILED_WHEEL"):
    commands |= {"bdist_wheel": AnyPythonWheel, "install_lib": WithKernels}
    setup(distclass=PlatformDistribution, cmdclass=commands)
else:
    setup(cmdclass=commands)

"""Builds ``mpo_ext._C`` with CMake. Needs a C++17 compiler, but neither torch nor a GPU."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds the CMake project; setuptools determines the folder of the result."""

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "MPO_CUDA": os.environ.get("MPO_CUDA", "AUTO"),
            "MPO_WERROR": os.environ.get("MPO_WERROR", "OFF"),
            "MPO_OUTPUT_DIR": out.parent,
        }
        if archs := os.environ.get("MPO_CUDA_ARCHS"):
            options["MPO_CUDA_ARCHS"] = archs
        # --fresh: the cache of an earlier `pip install .` names a ninja in a build environment that pip has deleted.
        configure = ["cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(work)]
        self.spawn(configure + [f"-D{name}={value}" for name, value in options.items()])
        self.spawn(["cmake", "--build", str(work)])


setup(
    # CMakeLists.txt lists the sources to compile; MANIFEST.in lists the files of the source distribution.
    ext_modules=[Extension("mpo_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

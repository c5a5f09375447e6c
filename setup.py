"""Builds ``mpo_ext._C`` with CMake. The build requires a C++17 compiler, but neither torch nor a GPU."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds the CMake project, and writes the module to the folder that setuptools chooses.

    Object files stay in ``build/native-*``, so a later build compiles only what has changed.
    """

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        work.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            # An earlier `pip install .` has stored the ninja of a build environment that pip has deleted.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "MPO_CUDA": os.environ.get("MPO_CUDA", "AUTO"),
            "MPO_WERROR": os.environ.get("MPO_WERROR", "OFF"),
            "MPO_OUTPUT_DIR": out.parent,
        }
        if archs := os.environ.get("MPO_CUDA_ARCHS"):
            options["MPO_CUDA_ARCHS"] = archs
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(work)]
        if not _belongs_to(work, ROOT):
            configure.insert(1, "--fresh")
        self.spawn(configure + [f"-D{name}={value}" for name, value in options.items()])
        self.spawn(["cmake", "--build", str(work)])


def _belongs_to(work: Path, source: Path) -> bool:
    """Returns whether the CMake cache in the build folder ``work`` was made for the source folder ``source``.

    CMake rejects the cache of a source tree that was copied to another folder.
    """
    cache = work / "CMakeCache.txt"
    return cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={source}\n" in cache.read_text()


setup(
    # CMakeLists.txt lists the sources to compile; MANIFEST.in lists the files of the source distribution.
    ext_modules=[Extension("mpo_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

"""Tests that the package can be built, installed and imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = (
    "mpo_ext",
    "kernels",
    "csrc",
    "CMakeLists.txt",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
USE = "import torch, mpo_ext; print(mpo_ext.token_logp(torch.zeros(2, 4), torch.tensor([1, 2]), shift=False).tolist())"
#: Prints why the compiled module does not load. Without the finder of an editable install of the tree under test.
LOAD = (
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in f'{f} {type(f)}'.lower()]\n"
    "from mpo_ext.ops.native import compiled\n"
    "try: compiled()\nexcept ImportError as e: print(e)"
)


def run(*command: str, cwd: Path, path: str | None = None) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MPO_CPU_ISA")}
    env["MPO_CUDA"] = (
        "OFF"  # the paths through the build are the same; tests/cuda/test_sass.py looks at the CUDA module
    )
    if path is not None:
        env["PYTHONPATH"] = path
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*args: str, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *args, cwd=cwd)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of the sources without compiled modules."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel twice from the same checkout, and returns it. The second build must succeed too.

    Also checks the files of the source distribution, and builds another wheel from the source distribution.
    """
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(out), str(checkout), cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert any(name.endswith("csrc/mpo/cpu/vec.inl") for name in names)
    assert not any(name.endswith(".so") for name in names)
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(out / "from-sdist"), str(sdist), cwd=out)
    for _ in range(2):
        pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(out), ".", cwd=checkout)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mpo_ext"}
    assert any(name.startswith("mpo_ext/_C.") for name in names)
    assert "mpo_ext/py.typed" in names
    assert {"mpo_ext/demo/start.json", "mpo_ext/demo/start.safetensors", "mpo_ext/templates/demo.html.j2"} <= set(
        names
    )
    assert wheel.stat().st_size < 8 * 2**20


def test_an_installed_wheel_works_elsewhere_and_not_in_the_checkout(
    wheel: Path, checkout: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    pip("install", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    expected = "[-1.3862943649291992, -1.3862943649291992]"
    # -S and -I would drop torch as well; an editable install of the tree under test is hidden by the path's order.
    assert run(sys.executable, "-c", USE, cwd=tmp_path, path=str(site)).strip() == expected
    assert "run here as" in run(sys.executable, "-m", "mpo_ext", "doctor", cwd=tmp_path, path=str(site))
    # In the checkout, Python imports the source folder, whose kernels may differ from the installed ones.
    assert not list((checkout / "mpo_ext").glob("_C*"))
    message = run(sys.executable, "-c", LOAD, cwd=checkout, path=str(site))
    assert f"mpo_ext is installed in {site / 'mpo_ext'}, but Python imports the source tree" in message
    assert "pip install -e ." in message


def test_a_missing_native_module_says_what_to_do(checkout: Path) -> None:
    code = "import importlib.metadata as m; m.distributions = lambda **k: []\n" + LOAD
    message = run(sys.executable, "-c", code, cwd=checkout)
    assert "did not load" in message
    assert "pip install ." in message


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, mpo_ext; print([m for m in ('torch', 'numpy', 'sklearn', 'matplotlib') if m in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=tmp_path, path=str(ROOT)).strip() == "[]"


def test_no_torch_is_needed_to_build() -> None:
    requires = (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    assert "torch" not in requires.split("#")[0]
    assert "torch" not in (ROOT / "CMakeLists.txt").read_text()

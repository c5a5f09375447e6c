"""Tests the repository that tools/hub_kernel.py writes for Hugging Face's package ``kernels``."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hub_kernel
import pytest
import torch

import mpo_ext
from mpo_ext.ops import native


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the path of a zip file that imitates a wheel. The file holds only the compiled module of mpo_ext."""
    path = tmp_path_factory.mktemp("wheels") / "mpo_ext-0.whl"
    module = Path(str(native.compiled().__file__))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(module, f"mpo_ext/{module.name}")
    return path


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    out = tmp_path_factory.mktemp("hub")
    names = list(hub_kernel.build(out, [wheel], "owner/mpo-ext", 0))
    assert names[0] == "torch-universal"
    assert [path.name for path in sorted((out / "build").iterdir())] == sorted(names)
    return out


@pytest.fixture
def forget() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.startswith("_mpo_ext_")]:
        del sys.modules[name]


def load(folder: Path) -> ModuleType:
    """Imports a build of the kernel from its folder, as the package ``kernels`` does."""
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def losses(library: Any) -> list[torch.Tensor]:
    """Returns losses and gradients, computed from logits and from hidden states."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 16, generator=generator).requires_grad_()
    weight = torch.randn(300, 16, generator=generator).requires_grad_()
    labels = torch.randint(300, (4, 6), generator=generator)
    labels[:, :2] = -100
    ref_logp = torch.full((4,), -25.0)
    results = []
    shift = library.RewardShift()
    for out in (
        library.linear_mpo_loss(hidden, weight, labels, ref_logp, reward_shift=shift),
        library.mpo_loss(hidden @ weight.T, labels, ref_logp, reward_shift=0.2),
    ):
        results += [out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))]
    return results


def test_variants_compute_the_loss_of_the_package_side_by_side(repository: Path, forget: None) -> None:
    truth = losses(mpo_ext)
    variants = {path.name: load(path) for path in sorted((repository / "build").iterdir())}
    assert len({variant.__name__ for variant in variants.values()}) == 2
    for name, variant in variants.items():
        torch.testing.assert_close(losses(variant), truth, rtol=1e-5, atol=1e-6)
        out = variant.mpo_loss(torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.long), torch.zeros(2))
        assert out.backend == ("reference" if name == "torch-universal" else "cpu")
        assert variant.preference.__name__ == f"{variant.__name__}.loss.preference"
    modules = [module for name, module in sys.modules.items() if name.startswith("_mpo_ext_")]
    assert all(str(repository) in str(module.__file__) for module in modules)


def test_metadata_name_the_files_and_the_backend(repository: Path) -> None:
    for folder in (repository / "build").iterdir():
        metadata = json.loads((folder / "metadata.json").read_text())
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert set(metadata["digest"]["files"]) == files - {"metadata.json"}
        assert metadata["backend"] == {"type": "cpu"} or native.compiled().has_cuda
        assert metadata["id"].isidentifier()
        assert folder.name in (repository / "README.md").read_text()


def test_the_old_layout_leads_to_the_same_module(repository: Path, forget: None) -> None:
    folder = repository / "build" / "torch-universal"
    spec = importlib.util.spec_from_file_location("mpo_ext_of_old_kernels", folder / "mpo_ext" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert torch.equal(losses(module)[0], losses(load(folder))[0])


def test_the_cuda_backend_is_read_from_the_module() -> None:
    module = ModuleType("_C")
    module.has_cuda, module.cuda_compiler = True, "nvcc 13.0.88"  # type: ignore[attr-defined]
    module.cuda_archs = "80, 90, 120 and PTX"  # type: ignore[attr-defined]
    assert hub_kernel.backend_of(module) == ("cu130", {"type": "cuda", "archs": ["8.0", "9.0", "12.0+PTX"]})


def test_wheels_without_the_module_and_fixed_names_are_refused(tmp_path: Path, wheel: Path) -> None:
    empty = tmp_path / "empty.whl"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("mpo_ext/__init__.py", "")
    with pytest.raises(ValueError, match=r"wheels must have the compiled module mpo_ext/_C, got .*empty.whl"):
        hub_kernel.compiled_modules([empty])
    twice = shutil.copy(wheel, tmp_path / "twice.whl")
    with pytest.raises(ValueError, match="wheels must be for different versions of Python, got two with _C"):
        hub_kernel.compiled_modules([wheel, Path(twice)])
    with pytest.raises(ValueError, match=r"wheels must have one for the running Python \(_C.*, got _C.other.so"):
        hub_kernel.load({"_C.other.so": b""})
    with pytest.raises(ValueError, match=r"loss/a.py must import mpo_ext by `from mpo_ext`, got 'import mpo_ext.ops'"):
        hub_kernel.convert("loss/a.py", "import mpo_ext.ops\n", "k", pure_python=True)


def test_the_kernels_package_loads_it(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("kernels.load", reason="make hub-kernel runs this test with Hugging Face's kernels package")
    copy = shutil.copytree(repository, tmp_path / "hub", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys, torch, kernels\nfrom pathlib import Path\n"
        "from kernels._rust import Digest, DigestAlgorithm, Metadata\n"
        "for folder in Path(sys.argv[1], 'build').iterdir():\n"
        "    expected = Metadata.read_from_file(folder / 'metadata.json').digest\n"
        "    expected.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))\n"
        "one = kernels.get_local_kernel(Path(sys.argv[1]))\n"
        "two = kernels.get_kernel('owner/mpo-ext', version=0)\n"
        "variants = [kernels.get_local_kernel(path) for path in sorted(Path(sys.argv[1], 'build').iterdir())]\n"
        "assert 'mpo_ext' not in sys.modules\n"
        "x = torch.randn(2, 3, 50, requires_grad=True)\n"
        "for kernel in (one, two, *variants):\n"
        "    out = kernel.mpo_loss(x, torch.ones(2, 3, dtype=torch.long), torch.full((2,), -9.0))\n"
        "    out.loss.backward()\n"
        "    print(kernel.__name__, out.backend, out.loss.item())\n"
    )
    environment = {"LOCAL_KERNELS": f"owner/mpo-ext={copy}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(copy)], capture_output=True, text=True, check=False,
        cwd=copy, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    chosen = "reference" if native.compiled().has_cuda else "cpu"  # torch here has no CUDA
    assert [line[1] for line in lines] == [chosen, chosen, "cpu", "reference"]
    assert lines[0] == lines[1]
    assert [float(line[2]) for line in lines] == pytest.approx([float(lines[0][2])] * 4, rel=1e-6)

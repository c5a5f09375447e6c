"""Writes the loss as a repository for Hugging Face's package ``kernels``, which loads it without an installation.

    python tools/hub_kernel.py build/hub
    python tools/hub_kernel.py build/hub --wheels dist/*.whl

The repository has a folder for each build variant. ``kernels`` loads the best variant for a machine. The variant
torch-universal has the Triton kernels and the loss in plain torch. ``--wheels`` takes wheels of this project, one for
each version of Python. The compiled modules of these wheels form another variant. This variant is for CUDA if the
modules have CUDA kernels, otherwise for the CPU. The modules do not use torch's ABI. The name of the variant begins
with torch-stable-abi26, so ``kernels`` loads the variant with torch 2.6 or later.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import json
import platform
import re
import shutil
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAME = "mpo-ext"
OLDEST_TORCH = "26"  # 2.6, as in pyproject.toml
#: Files of a variant: the folder in the variant, the folder in the source tree, and a pattern.
SOURCES = (("", "mpo_ext", "checks.py"), ("loss", "mpo_ext/loss", "*.py"), ("ops", "mpo_ext/ops", "*.py"),
           ("kernels", "kernels/mpo_triton", "*.py"))  # fmt: skip
FACE = '''"""The losses of mpo_ext (Mixed Preference Optimization, arXiv 2411.10442) as a kernel of the hub."""

from .loss import *  # noqa: F403
from .loss import __all__, preference  # noqa: F401
'''
# Versions of `kernels` before 0.13 load this package instead of the variant's folder.
OLD_FACE = '''"""The package in the folder above, for old versions of ``kernels``."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parent.parent / "__init__.py"
_spec = importlib.util.spec_from_file_location("ID", _path)
sys.modules.setdefault("ID", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(sys.modules["ID"])
globals().update(vars(sys.modules["ID"]))
'''
CARD = """---
library_name: kernels
license: apache-2.0
---

# mpo-ext

The loss of Mixed Preference Optimization (DPO, BCO and next-token loss) without a copy of the logits.

```python
from kernels import get_kernel

mpo = get_kernel("{repository}", version={version}, trust_remote_code=True)
out = mpo.mpo_loss(logits, labels, ref_logp)
```

`mpo.linear_mpo_loss` takes hidden states and the output head, and computes no logits. On GPUs the Triton kernels run,
or the CUDA kernels of a variant for CUDA. On a CPU, torch-universal runs plain torch.

| variant | backends | Python |
| --- | --- | --- |
{variants}
"""


def sources() -> dict[str, str]:
    """Returns the files of the loss as a dict from path to source code.

    A path, such as "ops/native.py", is relative to the folder of a build variant.
    """
    return {
        Path(folder, path.name).as_posix(): path.read_text(encoding="utf-8")
        for folder, source, pattern in SOURCES
        for path in sorted((ROOT / source).glob(pattern))
    }


def convert(path: str, text: str, kernel_id: str, *, pure_python: bool) -> str:
    """Returns the text of a module of mpo_ext after its conversion for a build variant.

    Absolute imports of mpo_ext become relative imports. Operators move to the namespace ``kernel_id``, so that one
    process can load several versions of the kernel.

    Args:
        path: Path of the module in the package, such as "ops/native.py".
        text: Text of the module.
        kernel_id: Namespace of the operators.
        pure_python: Whether the variant has no compiled module.

    Raises:
        ValueError: If an import cannot be converted.
    """
    dots = "." * (path.count("/") + 1)
    text = re.sub(r"^(\s*)from mpo_ext\.", rf"\1from {dots}", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*)from mpo_ext import", rf"\1from {dots} import", text, flags=re.MULTILINE)
    text = text.replace('"mpo_ext::', f'"{kernel_id}::')
    if path == "ops/native.py" and pure_python:
        assert text.count("PURE_PYTHON = False") == 1
        text = text.replace("PURE_PYTHON = False", "PURE_PYTHON = True")
    if left := re.search(
        r"^\s*(from|import) mpo_ext\b.*|import_module\([^)]*mpo_ext.*|torch\.ops\.mpo_ext.*", text, re.M
    ):
        raise ValueError(f"{path} must import mpo_ext by `from mpo_ext`, got {left[0].strip()!r}")
    return text


def write_variant(folder: Path, modules: dict[str, bytes], facts: dict[str, Any], version: int) -> None:
    """Writes a build variant to ``folder``: Python modules, the compiled ``modules`` (may be empty) and metadata.json.

    ``facts`` describes the backend, as returned by ``backend_of``.
    """
    texts = sources()
    unique = hashlib.sha256(json.dumps([texts, facts, sorted(modules)]).encode())
    for name in sorted(modules):
        unique.update(modules[name])
    kernel_id = f"_mpo_ext_{facts['type']}_{unique.hexdigest()[:10]}"
    files = {
        "__init__.py": FACE,
        "mpo_ext/__init__.py": OLD_FACE.replace("ID", kernel_id),
        **{path: convert(path, text, kernel_id, pure_python=not modules) for path, text in texts.items()},
    }
    contents = {path: text.encode() for path, text in files.items()} | modules
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    digests = {path: base64.b64encode(hashlib.sha256(contents[path]).digest()).decode() for path in sorted(contents)}
    metadata = {
        "name": NAME, "id": kernel_id, "version": version, "license": "Apache-2.0", "python-depends": [],
        "backend": facts, "digest": {"algorithm": "sha256", "files": digests},
    }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def compiled_modules(wheels: list[Path]) -> dict[str, bytes]:
    """Returns the compiled modules in the wheels, as a dict from file name to content.

    Raises:
        ValueError: If a wheel has no compiled module, or two wheels are for the same version of Python.
    """
    modules: dict[str, bytes] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("mpo_ext/_C.")]
            for name in names:
                if Path(name).name in modules:
                    raise ValueError(
                        f"wheels must be for different versions of Python, got two with {Path(name).name}"
                    )
                modules[Path(name).name] = archive.read(name)
        if not names:
            raise ValueError(f"wheels must have the compiled module mpo_ext/_C, got {wheel} without")
    return modules


def load(modules: dict[str, bytes]) -> ModuleType:
    """Imports the compiled module for the running version of Python, and returns it.

    Raises:
        ValueError: If ``modules`` has no such module.
    """
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if name not in modules:
        raise ValueError(f"wheels must have one for the running Python ({name}), got {', '.join(modules)}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(modules[name])
        spec = importlib.util.spec_from_file_location("_C", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def backend_of(module: ModuleType) -> tuple[str, dict[str, Any]]:
    """Returns (name, description) of a module's backend.

    The name is "cpu" or, for example, "cu130". The description is the field ``backend`` of metadata.json.
    """
    if not module.has_cuda:
        return "cpu", {"type": "cpu"}
    version = re.search(r"(\d+)\.(\d+)", module.cuda_compiler)
    assert version is not None
    archs = [f"{arch[:-1]}.{arch[-1]}" for arch in re.findall(r"\d+", module.cuda_archs)]
    return f"cu{version[1]}{version[2]}", {"type": "cuda", "archs": [*archs[:-1], f"{archs[-1]}+PTX"]}


def build(out: Path, wheels: list[Path], repository: str, version: int) -> Iterator[str]:
    """Writes the repository to ``out``, and yields the names of its build variants."""
    shutil.rmtree(out / "build", ignore_errors=True)
    rows = ["| torch-universal | Triton on GPUs, plain torch | any |"]
    write_variant(out / "build" / "torch-universal", {}, {"type": "cpu"}, version)
    yield "torch-universal"
    if wheels:
        modules = compiled_modules(wheels)
        backend, facts = backend_of(load(modules))
        pythons = ", ".join(sorted(re.sub(r".*cpython-3(\d+).*", r"3.\1", name) for name in modules))
        title = f"torch-stable-abi{OLDEST_TORCH}-{backend}-{platform.machine()}-linux"
        write_variant(out / "build" / title, modules, facts, version)
        rows.append(f"| {title} | {'CUDA, ' if backend != 'cpu' else ''}CPU, Triton | {pythons} |")
        yield title
    card = CARD.format(repository=repository, version=version, variants="\n".join(rows))
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the repository")
    parser.add_argument("--wheels", type=Path, nargs="+", action="extend", default=[], help="wheels of this project")
    parser.add_argument("--repository", default=f"OWNER/{NAME}", help="name on the hub, for the card")
    parser.add_argument("--version", type=int, default=0, help="version of the kernel; 0: not yet stable")
    options = parser.parse_args()
    for name in build(options.out, options.wheels, options.repository, options.version):
        print(options.out / "build" / name)


if __name__ == "__main__":
    main()

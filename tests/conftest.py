"""Fixtures that choose the backend, the device, and the CPU's instruction set of a test."""

import os
from collections.abc import Iterator

import pytest
import torch
from devices import device_of, is_left_out

# Tensors are small here, so threads would wait longer than they work. Tests of threads set their number.
torch.set_num_threads(1)

# The dtype of products on a CPU depends on the CPU; the bounds of most tests hold for widened inputs.
os.environ.setdefault("MPO_CPU_MATMUL", "float32")

# Every backend of the package can be named here; `cuda` and `triton` need a GPU.
BACKENDS = os.environ.get("MPO_TEST_BACKENDS", "reference,cpu").split(",")


def _engines() -> list[str]:
    """Returns the backends to test. The CPU backend occurs once for each supported instruction set."""
    engines = [name for name in BACKENDS if name != "cpu"]
    if "cpu" in BACKENDS:
        try:
            from mpo_ext.ops.native import cpu_isas

            engines += [f"cpu-{isa}" for isa in cpu_isas()]
        except ImportError:
            engines.append("cpu")  # its tests then fail with the message of the package
    return engines


ENGINES = _engines()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Returns the name of a backend."""
    return request.param


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns the name of a backend; for "cpu", sets MPO_CPU_ISA to the instruction set of this test case."""
    return _select(request.param, monkeypatch)


@pytest.fixture(params=[name for name in ENGINES if name != "reference"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns the name of a backend that has kernels. Only the backend "reference" (plain torch) has none."""
    return _select(request.param, monkeypatch)


def _select(engine: str, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, isa = engine.partition("-")
    if isa:
        monkeypatch.setenv("MPO_CPU_ISA", isa)
    return name


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Returns the device of the tensors for the test's backend."""
    (fixture,) = {"backend", "engine", "kernel"}.intersection(request.fixturenames)
    return device_of(request.getfixturevalue(fixture))


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests, so that the backends of a case follow each other. The oracle then computes each case once.

    Skips float64 cases on GPU kernels, which do not support float64.
    """
    for item in items:
        if hasattr(item, "callspec") and is_left_out(item.callspec.params):
            item.add_marker(pytest.mark.skip(reason="the kernels of a GPU take no float64"))
    order: dict[tuple, int] = {}

    def place(item: pytest.Item) -> int:
        indices = item.callspec.indices if hasattr(item, "callspec") else {}
        case = tuple((name, index) for name, index in indices.items() if name not in ("backend", "engine", "kernel"))
        return order.setdefault((item.path, item.parent, getattr(item, "originalname", item.name), case), len(order))

    for item in items:
        place(item)
    items.sort(key=place)

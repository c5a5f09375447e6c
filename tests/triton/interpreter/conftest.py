"""Makes Triton's interpreter round to bfloat16 like a GPU."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the interpreter round float32 to the nearest bfloat16, as compiled code does."""
    cast = InterpreterBuilder.cast_impl

    def rounding_cast(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar.name, dtype.scalar.name) != ("fp32", "bf16"):
            return cast(self, source, dtype)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(source.data), 0x7FC0, rounded)
        return TensorHandle(rounded.astype(np.uint16), dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
    with np.errstate(all="ignore"):  # infinities and NaN are part of the contract
        yield

"""Tests the Triton kernels without a GPU. Triton interprets the kernels, or compiles them to PTX for a simulator.

When Triton is imported, TRITON_INTERPRET=1 makes it interpret all kernels. So ``make test`` runs pytest twice: with
this variable for the tests in interpreter/, and without it for the other tests.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

sys.path.append(str(ROOT / "tests" / "cuda"))  # simulator.py, for the cases on which all kernels must agree

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore = ["test_triton_compiled.py", "test_triton_choice.py"]
else:
    collect_ignore = ["interpreter"]

"""Tests the Triton kernels without a GPU: in Triton's interpreter, and compiled to PTX that a simulator runs.

Triton decides when it is imported whether it interprets or compiles kernels. So ``make test`` runs pytest twice: with
TRITON_INTERPRET=1 for the tests in interpreter/, and without it for the others.
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

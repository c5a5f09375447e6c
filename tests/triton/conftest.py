"""The Triton kernels without a GPU: in Triton's interpreter, and compiled to PTX and run by a simulator.

Triton is either interpreted or compiling, from its import on. So there are two runs, which `make test` makes: with
TRITON_INTERPRET=1 the tests in interpreter/, without it the others.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

sys.path.append(str(ROOT / "tests" / "cuda"))  # simulator.py, for the cases that all kernels must agree on

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore = ["test_triton_compiled.py", "test_triton_choice.py"]
else:
    collect_ignore = ["interpreter"]

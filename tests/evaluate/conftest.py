"""The stand-in for a model is that of the tests of generation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "generate"))

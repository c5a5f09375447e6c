"""Times one build of the native module: ``python -m benchmarks.gpu.tune_target --module FILE``.

The stage "tune" runs this program for each build.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """Loads the native module ``--module``, times its kernels, and writes gpu_tune.json to the folder ``--out``."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--module", type=Path, required=True, help="the built native module")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result file")
    parser.add_argument("--dry", action="store_true", help="small sizes on a CPU")
    args = parser.parse_args()
    # Loaded under the name of the package's module, before the package looks for its own.
    name = ".".join(("mpo_ext", "_C"))
    spec = importlib.util.spec_from_file_location(name, args.module)
    if spec is None or spec.loader is None:
        parser.error(f"--module must be a Python extension module, got {args.module}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    time_module(args.out, dry=args.dry)
    return 0


def time_module(out: Path, *, dry: bool) -> None:
    """Times forward and backward on the two main shapes, with and without statistics, and writes gpu_tune.json."""
    import benchmarks.gpu.logits as stage_logits
    from benchmarks import logits
    from benchmarks.gpu.session import GpuStage
    from mpo_ext.plan.roofline import LossShape

    stage = GpuStage("tune", out, dry=dry, command="python -m benchmarks.gpu.tune_target")
    stage.settings |= {"bytes_per_s": stage_logits.bandwidths(stage.device, 1 << (20 if dry else 32))}
    for loss in [LossShape(tokens=8, vocab=203)] if dry else stage_logits.SHAPES[:2]:
        batch = logits.LogitsBatch(loss, stage.device)
        for name in ("mpo_ext" if dry else "mpo_ext, cuda", logits.STATISTICS):
            stage_logits.measure(stage, loss, batch, batch.logits, name)


if __name__ == "__main__":
    sys.exit(main())

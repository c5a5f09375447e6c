"""Runs training in a process that kills itself with SIGKILL in the middle of a step."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def kill_in_step(step: int, module: str, *arguments: Any) -> None:
    """Trains in a separate process. SIGKILL ends this process right before the optimizer update of ``step``.

    The process calls ``module.run_until_killed(*arguments)``, with the arguments as strings. ``run_until_killed`` must
    train with transformers' Trainer.
    """
    words = [sys.executable, __file__, str(step), module, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


def main(step: str, module: str, *arguments: str) -> None:
    import torch
    import transformers.trainer

    class Kill(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == int(step) - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    run_until_killed = importlib.import_module(module).run_until_killed
    transformers.trainer.DEFAULT_CALLBACKS.append(Kill)  # after the import, in which ms-swift replaces the list
    run_until_killed(*arguments)


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent / "train")]
    main(*sys.argv[1:])

"""What several commands share: options, exit statuses, broken pipes."""

import os
import sys


def leave_broken_pipe() -> int:
    """Lets nothing more be written to a pipe whose reader has gone, as ``head`` does. Returns the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1

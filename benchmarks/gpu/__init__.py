"""Checks and benchmarks on a GPU: ``python -m benchmarks.gpu --stage NAME``. ``--dry`` tests them on a CPU."""

"""Checks and benchmarks on a GPU, in stages: ``python -m benchmarks.gpu --stage NAME``. ``--dry`` uses a CPU."""

"""Benchmarks, for example ``python -m benchmarks.logits``, to be run in the root of the repository."""

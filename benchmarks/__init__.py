"""Benchmarks. Run them in the root of the repository, for example ``python -m benchmarks.logits``."""

"""Benchmarks: ``python -m benchmarks.logits``. Run from the root of the checkout."""

"""Predicts the time and the memory of a loss, a training step and a training run."""

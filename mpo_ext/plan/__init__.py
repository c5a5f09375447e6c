"""Predicted time and memory of a loss, a training step and a recipe."""

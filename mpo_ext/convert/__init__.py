"""Converts checkpoints in the formats of their authors to the format of transformers."""

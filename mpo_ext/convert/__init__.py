"""Converts checkpoints from the formats of model authors to the format of transformers."""

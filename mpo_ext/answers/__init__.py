"""Extracting answers from responses and matching them."""

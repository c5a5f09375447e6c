"""Measures the accuracy of models on questions with a known answer: ``mpo-ext evaluate``, ``mpo_ext.evaluate.run``."""

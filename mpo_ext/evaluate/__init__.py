"""Accuracy of models on questions with a known answer: ``mpo-ext evaluate`` and ``mpo_ext.evaluate.run.evaluate``."""

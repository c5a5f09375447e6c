"""The kernels as torch operators, the checks of their arguments, and the choice of the backend.

A row is the V logits of one token position. A row is labelled if the label of its position is not ``ignore_index``.
"""

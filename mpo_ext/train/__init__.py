"""Training: an accelerate loop over preference pairs (``mpo-ext train``, ``accelerate launch -m mpo_ext.train``)."""

"""Training with accelerate on preference pairs (``mpo-ext train``, ``accelerate launch -m mpo_ext.train``)."""

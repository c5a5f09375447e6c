"""The kernels as torch operators (``logits``, ``pair_loss``, ``linear``), their checks, and the choice of backend."""

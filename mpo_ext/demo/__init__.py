"""The digits demo, in minutes on a CPU: SFT, pairs from the model's answers, and training with SFT, DPO and MPO.

``mpo-ext demo`` runs the demo, which requires the packages of the extra ``demo``.
"""

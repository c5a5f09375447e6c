"""The digits demo: SFT, pairs from the model's answers, and three kinds of further training, in minutes on a CPU.

``mpo-ext demo`` runs the demo, which requires the packages of the extra ``demo``.
"""

"""The digits demo: trains a tiny model by SFT, makes pairs from its answers, and trains it further by SFT, DPO or MPO.

``mpo-ext demo`` runs the demo in minutes on a CPU. It requires the packages of the extra ``demo``.
"""

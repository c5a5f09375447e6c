"""The digits demo: SFT, pairs from the model's answers, and three ways of further training, in minutes on a CPU.

``mpo-ext demo`` runs it (``mpo_ext.cli.demo``). It needs the packages of the extra ``demo``.
"""

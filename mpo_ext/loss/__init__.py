"""The loss: ``mpo_loss``, ``linear_mpo_loss``, ``token_logp``, ``linear_token_logp`` and their settings."""

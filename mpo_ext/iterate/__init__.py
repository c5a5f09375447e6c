"""On-policy MPO in rounds: sample pairs from the newest model, train on them, evaluate (``mpo-ext iterate``)."""

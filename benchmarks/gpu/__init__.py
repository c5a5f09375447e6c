"""Everything that needs a GPU, in stages: ``python -m benchmarks.gpu --stage NAME``. ``--dry`` runs it on a CPU."""

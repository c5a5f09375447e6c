"""The command line ``mpo-ext``: one file per command."""

"""Preference pairs: the record, MMPR files, TRL's format, Hugging Face datasets, checks, statistics and a viewer."""

from mpo_ext.data.jsonl import BadLine, LineFile, Location, Pairs, Skipped, read_pairs, write_pairs
from mpo_ext.data.mmpr import MMPRDataset, read_meta, write_mmpr
from mpo_ext.data.records import Pair
from mpo_ext.data.sources import Source, open_pairs

__all__ = [
    "BadLine",
    "LineFile",
    "Location",
    "MMPRDataset",
    "Pair",
    "Pairs",
    "Skipped",
    "Source",
    "open_pairs",
    "read_meta",
    "read_pairs",
    "write_mmpr",
    "write_pairs",
]

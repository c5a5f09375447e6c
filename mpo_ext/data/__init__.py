"""Preference pairs: the class ``Pair``, readers and writers of file formats, checks, statistics and a viewer."""

from mpo_ext.data.jsonl import LineFile, read_pairs, write_pairs
from mpo_ext.data.mmpr import MMPRDataset, read_meta, write_mmpr
from mpo_ext.data.reader import BadLine, Location, PairSequence, Skipped
from mpo_ext.data.records import Pair
from mpo_ext.data.sources import PairSource, open_pairs

__all__ = [
    "BadLine",
    "LineFile",
    "Location",
    "MMPRDataset",
    "Pair",
    "PairSequence",
    "PairSource",
    "Skipped",
    "open_pairs",
    "read_meta",
    "read_pairs",
    "write_mmpr",
    "write_pairs",
]

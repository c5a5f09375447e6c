"""Fixtures of the files in ``mmpr_files``."""

from mmpr_files import broken, images, mmpr, write_lines  # noqa: F401

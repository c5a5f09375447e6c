"""Makes the fixtures of ``mmpr_files`` available to the tests in this folder."""

from mmpr_files import broken, images, mmpr, write_lines  # noqa: F401

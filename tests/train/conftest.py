import logging

# torch's checkpoints log every tensor, which would bury the report of a test that fails.
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)

"""The kernels as torch operators: checks, backends, operators and their fakes."""

"""The kernels as torch operators, the checks of their arguments, and the choice of the backend."""

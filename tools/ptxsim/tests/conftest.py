import os
from concurrent.futures import ThreadPoolExecutor

import ptxsim
import pytest
from ptxsim.testing import need_nvcc

HERE = os.path.dirname(os.path.abspath(__file__))
ARCHS = ["sm_80", "sm_90", "sm_100"]


@pytest.fixture(scope="session")
def compiled():
    need_nvcc()
    pool = ThreadPoolExecutor(len(ARCHS))
    return {a: pool.submit(ptxsim.compile_cuda, os.path.join(HERE, "kernels.cu"), arch=a) for a in ARCHS}


@pytest.fixture(scope="session", params=ARCHS)
def cuda(request, compiled):
    """Returns the module of kernels.cu, compiled for one architecture."""
    mod = ptxsim.Module(compiled[request.param].result())
    mod.arch = request.param
    return mod

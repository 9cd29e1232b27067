"""Where the kernels' tests run: in Triton's interpreter, in a process of their own, and on a GPU."""

import os

import pytest
import torch

from fxfreeze.kernels import engine

_ENGINES = {"cpu": "interpreter", "cuda": "triton"}


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """A device on which kernels run, never the reference, which they are compared with."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if request.param == "cpu" and not interpreting:
        pytest.skip("run by `make test`, with TRITON_INTERPRET=1")
    if request.param == "cuda" and (interpreting or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device, without TRITON_INTERPRET=1")
    assert engine(request.param) == _ENGINES[request.param]
    return torch.device(request.param)

"""Every kernel once under ``compute-sanitizer``: no access out of bounds, no use of what was not written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import NAMES

_SANITIZER = shutil.which("compute-sanitizer")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(_SANITIZER is None, reason="needs compute-sanitizer of the CUDA toolkit"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_clean(name: str, dtype: str) -> None:
    source = f"import torch\nfrom samples import sample\nsample({name!r}, 3, 'cuda', torch.{dtype})()\n"
    source += "torch.cuda.synchronize()"
    # Without PyTorch's pool of memory every tensor is an allocation, whose end the sanitizer knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [str(_SANITIZER), "--error-exitcode", "9", sys.executable, "-c", source]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""Fused inference kernels for frozen networks, imported as ``fxfreeze.kernels``.

The package is empty until the first kernel lands: the frozen prefix runs on PyTorch's own operators. What belongs
here needs torch and triton only and knows nothing of freezing: one file holds one fused op, ``reference.py`` its
specification in plain PyTorch.
"""

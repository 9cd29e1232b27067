"""A linear layer with bias and activation: a 1x1 convolution of images of one pixel.

y[r, o] = act(sum_c x[r, c] * weight[o, c] + bias[o]); x, y: (R, C) and (R, O), last dimension contiguous, rows anywhere.
"""

from torch import Tensor

from fxfreeze.kernels.configs import Config
from fxfreeze.kernels.gpu import conv1x1


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor, config: Config) -> None:
    """See ``conv1x1``."""
    one, none = (1, 1), (0, 0)
    x, weight, out = (t[:, :, None, None] for t in (x, weight, out))
    conv1x1.launch(x, weight, bias, None, None, "none", None, activation, one, none, one, out, config)

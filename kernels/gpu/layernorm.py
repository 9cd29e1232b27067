"""Layer normalisation of rows, with the scale and shift of a frozen transformer block.

y[r, :] = (x[r, :] - mean(x[r, :])) / sqrt(var(x[r, :]) + eps) * weight + bias
x, y: (R, C), C contiguous, rows anywhere; fp16, bf16 or fp32; weight, bias: (C,). Arithmetic in fp32, biased variance,
taken about the mean. A row is held in registers and read once.
"""

import triton
import triton.language as tl
from torch import Tensor

from fxfreeze.kernels.configs import Config
from fxfreeze.kernels.gpu.operands import image, unit

MOST_CHANNELS = 16384

_SIZES = "o_x o_y R C s_x s_y eps".split()


@triton.jit(do_not_specialize=_SIZES)
def layernorm_kernel(
    x, weight, bias, y, o_x, o_y, R, C, s_x, s_y, eps, V: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    m_c = o_c < C * V
    m = (o_r < R)[:, None] & m_c[None, :]
    n = (C * V).to(tl.float32)
    b_x = tl.load(x + ((o_r * s_x + o_x) * V)[:, None] + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    b_x -= (tl.sum(b_x, axis=1) / n)[:, None]
    b_var = tl.sum(tl.where(m_c[None, :], b_x * b_x, 0.0), axis=1) / n
    b_y = b_x / tl.sqrt(b_var + eps)[:, None]
    if weight is not None:
        b_y *= tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        b_y += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    tl.store(y + ((o_r * s_y + o_y) * V)[:, None] + o_c[None, :], b_y.to(y.dtype.element_ty), mask=m)


def launch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor, config: Config) -> None:
    """One program ``config.pixels`` rows, each whole."""
    rows, c = x.shape
    as_images = x[:, :, None, None], out[:, :, None, None]
    v = unit(*as_images)
    i_x, i_y = (image(t, v) for t in as_images)
    layernorm_kernel[(triton.cdiv(rows, config.pixels),)](
        i_x.base, weight, bias, i_y.base, i_x.start, i_y.start, rows, c // v, i_x.n, i_y.n, eps,
        V=v, BR=config.pixels, BC=triton.next_power_of_2(c), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

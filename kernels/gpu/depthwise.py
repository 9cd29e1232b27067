"""A depthwise convolution with bias and activation: each channel with a kernel of its own, no tensor cores.

y[n, c, h, w] = act(sum_rs x[n, c, h*S - P + r*D, w*S - P + s*D] * weight[c, 0, r, s] + bias[c])
x, y: (N, C, H, W), channels contiguous, other strides free; fp16, bf16 or fp32; weight: (C, 1, R, S), any strides, loaded
side by side where C is contiguous. Arithmetic in fp32. Bound by memory: x comes from DRAM once, for its taps from the L1
and L2 caches.
"""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fxfreeze.kernels.configs import Config
from fxfreeze.kernels.gpu.blocks import finished
from fxfreeze.kernels.gpu.operands import image, unit

_SIZES = "o_x o_y P HY WY H W C SH SW PH PW DH DW s_xn s_xh s_xw s_wc s_wr s_ws s_yn s_yh s_yw".split()


@triton.jit(do_not_specialize=_SIZES)
def depthwise_kernel(
    x, w, bias, y, o_x, o_y, P, HY, WY, H, W, C, SH, SW, PH, PW, DH, DW,
    s_xn, s_xh, s_xw, s_wc, s_wr, s_ws, s_yn, s_yh, s_yw,
    KH: tl.constexpr, KW: tl.constexpr, ACT: tl.constexpr, V: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    n_c = tl.cdiv(C * V, BC)
    o_p = (tl.program_id(0) // n_c).to(tl.int64) * BP + tl.arange(0, BP)
    o_c = tl.program_id(0) % n_c * BC + tl.arange(0, BC)
    m_p, m_c = o_p < P, o_c < C * V
    m = m_p[:, None] & m_c[None, :]
    o_w, o_h, o_n = o_p % WY, o_p // WY % HY, o_p // WY // HY
    o_top, o_left = o_h * SH - PH, o_w * SW - PW
    p_w = w + (o_c if PACKED else o_c.to(tl.int64) * s_wc)
    b_acc = tl.zeros((BP, BC), tl.float32)
    for r in tl.static_range(KH):
        for s in tl.static_range(KW):
            o_y0, o_x0 = o_top + r * DH, o_left + s * DW
            m_x = (m_p & (o_y0 >= 0) & (o_y0 < H) & (o_x0 >= 0) & (o_x0 < W))[:, None] & m_c[None, :]
            p_x = x + ((o_n * s_xn + o_y0 * s_xh + o_x0 * s_xw + o_x) * V)[:, None] + o_c[None, :]
            o_w0 = (r * s_wr + s * s_ws) * (V if PACKED else 1)
            b_w = tl.load(p_w + o_w0, mask=m_c, other=0.0).to(tl.float32)
            b_acc += tl.load(p_x, mask=m_x, other=0.0).to(tl.float32) * b_w[None, :]
    b_y = finished(b_acc, bias, None, None, o_c, m_c, m, ACT)
    p_y = y + ((o_n * s_yn + o_h * s_yh + o_w * s_yw + o_y) * V)[:, None] + o_c[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out: Tensor,
    config: Config,
) -> None:
    """One program a block of ``config.pixels`` output pixels and ``config.channels`` channels."""
    n, c, h, w = out.shape
    s_wc, _, s_wr, s_ws = weight.stride()
    packed = s_wc == 1
    v = unit(x, out, pitch=math.gcd(s_wr, s_ws) if packed else 0)
    u_w = v if packed else 1  # of one channel's weights after another's, no step is a multiple of anything
    i_x, i_y = image(x, v), image(out, v)
    grid = (triton.cdiv(n * h * w, config.pixels) * triton.cdiv(c, config.channels),)
    depthwise_kernel[grid](
        i_x.base, weight, bias, i_y.base, i_x.start, i_y.start, n * h * w, h, w, *x.shape[2:], c // v,
        *stride, *padding, *dilation, i_x.n, i_x.h, i_x.w, s_wc, s_wr // u_w, s_ws // u_w, i_y.n, i_y.h, i_y.w,
        KH=weight.shape[2], KW=weight.shape[3], ACT=activation, V=v, BP=config.pixels, BC=config.channels,
        PACKED=packed, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

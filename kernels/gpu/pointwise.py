"""Scale, shift and activation of each channel, and what pooling follows, in one pass over memory.

y = pool(act(x * scale + shift)): pool is none, an average or a maximum over a window, or the mean of the whole image.
x, y: (N, C, H, W), channels contiguous, other strides free; fp16, bf16 or fp32; scale, shift: (C,). Arithmetic in fp32.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fxfreeze.kernels.configs import Config
from fxfreeze.kernels.gpu.blocks import affine
from fxfreeze.kernels.gpu.operands import image, unit

_SIZES = "o_x o_y P HY WY H W C SH SW PH PW s_xn s_xh s_xw s_yn s_yh s_yw".split()
_GLOBAL_SIZES = "o_x o_y H W C s_xn s_xh s_xw s_yn".split()


@triton.jit(do_not_specialize=_SIZES)
def pointwise_kernel(
    x, scale, shift, y, o_x, o_y, P, HY, WY, H, W, C, SH, SW, PH, PW, s_xn, s_xh, s_xw, s_yn, s_yh, s_yw,
    KH: tl.constexpr, KW: tl.constexpr, ACT: tl.constexpr, POOL: tl.constexpr, COUNT_PAD: tl.constexpr,
    V: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n_c = tl.cdiv(C * V, BC)
    o_p = (tl.program_id(0) // n_c).to(tl.int64) * BP + tl.arange(0, BP)
    o_c = tl.program_id(0) % n_c * BC + tl.arange(0, BC)
    m_p, m_c = o_p < P, o_c < C * V
    m = m_p[:, None] & m_c[None, :]
    o_w, o_h, o_n = o_p % WY, o_p // WY % HY, o_p // WY // HY
    o_top, o_left = o_h * SH - PH, o_w * SW - PW
    b_acc = tl.full((BP, BC), float("-inf") if POOL == "max" else 0.0, tl.float32)
    for r in tl.static_range(KH):
        for s in tl.static_range(KW):
            o_y0, o_x0 = o_top + r, o_left + s
            m_x = (m_p & (o_y0 >= 0) & (o_y0 < H) & (o_x0 >= 0) & (o_x0 < W))[:, None] & m_c[None, :]
            p_x = x + ((o_n * s_xn + o_y0 * s_xh + o_x0 * s_xw + o_x) * V)[:, None] + o_c[None, :]
            b_x = affine(tl.load(p_x, mask=m_x, other=0.0), scale, shift, o_c, m_c, ACT)
            if POOL == "max":
                b_acc = tl.where(m_x & ((b_x > b_acc) | (b_x != b_x)), b_x, b_acc)  # NaN wins, as in PyTorch
            else:
                b_acc += tl.where(m_x, b_x, 0.0)
    if POOL == "avg":
        if COUNT_PAD:
            b_acc /= KH * KW
        else:
            n_h = tl.minimum(o_top + KH, H) - tl.maximum(o_top, 0)
            n_w = tl.minimum(o_left + KW, W) - tl.maximum(o_left, 0)
            b_acc /= (n_h * n_w).to(tl.float32)[:, None]
    p_y = y + ((o_n * s_yn + o_h * s_yh + o_w * s_yw + o_y) * V)[:, None] + o_c[None, :]
    tl.store(p_y, b_acc.to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=_GLOBAL_SIZES)
def global_mean_kernel(
    x, scale, shift, y, o_x, o_y, H, W, C, s_xn, s_xh, s_xw, s_yn,
    ACT: tl.constexpr, V: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n_c = tl.cdiv(C * V, BC)
    o_n = (tl.program_id(0) // n_c).to(tl.int64)
    o_c = tl.program_id(0) % n_c * BC + tl.arange(0, BC)
    m_c = o_c < C * V
    b_acc = tl.zeros((BP, BC), tl.float32)
    for i in range(tl.cdiv(H * W, BP)):
        o_p = i * BP + tl.arange(0, BP)
        m = (o_p < H * W)[:, None] & m_c[None, :]
        o_xp = o_n * s_xn + o_p // W * s_xh.to(tl.int64) + o_p % W * s_xw.to(tl.int64) + o_x
        b_x = tl.load(x + (o_xp * V)[:, None] + o_c[None, :], mask=m, other=0.0)
        b_acc += tl.where(m, affine(b_x, scale, shift, o_c, m_c, ACT), 0.0)
    b_y = tl.sum(b_acc, axis=0) / (H * W)
    tl.store(y + (o_n * s_yn + o_y) * V + o_c, b_y.to(y.dtype.element_ty), mask=m_c)


def launch(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    pool: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    out: Tensor,
    config: Config,
) -> None:
    """One program a block of ``config.channels`` channels, and of ``config.pixels`` output pixels or a whole image."""
    n, c, h, w = out.shape
    v = unit(x, out)
    i_x, i_y = image(x, v), image(out, v)
    blocks = triton.cdiv(c, config.channels)
    options = {"ACT": activation, "V": v, "BP": config.pixels, "BC": config.channels}
    options |= {"num_warps": config.warps, "num_stages": config.stages}
    if pool == "global":
        global_mean_kernel[(n * blocks,)](
            i_x.base, scale, shift, i_y.base, i_x.start, i_y.start, *x.shape[2:], c // v, i_x.n, i_x.h, i_x.w, i_y.n,
            **options,
        )  # fmt: skip
        return
    pointwise_kernel[(triton.cdiv(n * h * w, config.pixels) * blocks,)](
        i_x.base, scale, shift, i_y.base, i_x.start, i_y.start, n * h * w, h, w, *x.shape[2:], c // v,
        *stride, *padding, i_x.n, i_x.h, i_x.w, i_y.n, i_y.h, i_y.w,
        KH=kernel[0], KW=kernel[1], POOL=pool, COUNT_PAD=count_include_pad, **options,
    )  # fmt: skip

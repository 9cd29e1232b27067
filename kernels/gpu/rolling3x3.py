"""A 3x3 convolution to few output channels, each input row read once for its three output rows.

The same function as ``conv3x3`` at stride, padding and dilation 1, for at most 32 output channels (a DenseNet's growth).
An implicit matrix product would read x nine times, and a block of 16 or 32 columns would starve the tensor cores. Here a
program goes down a strip of rows of a block of (image, column) pairs. One product per input row, with the three vertical
taps side by side as columns, gives that row's share of the output rows above, at and below it: two running sums hold
what rows are not yet complete. x is read 3 (T + 2) / T times for strips of T rows.
"""

import triton
import triton.language as tl

from fxfreeze.kernels.gpu.blocks import accumulate, affine, finished
from fxfreeze.kernels.gpu.convolution import Convolution, launcher

MOST_OUTPUTS = 32

_SIZES = "o_x o_r o_y Q T H W C O s_xn s_xh s_xw s_wo s_wr s_ws s_rn s_rh s_rw s_yn s_yh s_yw".split()


@triton.jit(do_not_specialize=_SIZES)
def rolling3x3_kernel(
    x, w, bias, scale, shift, residual, y,
    o_x, o_r, o_y, Q, T, H, W, C, O,
    s_xn, s_xh, s_xw, s_wo, s_wr, s_ws, s_rn, s_rh, s_rw, s_yn, s_yh, s_yw,
    PRO: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    VC: tl.constexpr, VO: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n_t = tl.cdiv(H, T)
    first = tl.program_id(0) % n_t * T
    last = tl.minimum(first + T, H)
    o_q = (tl.program_id(0) // n_t).to(tl.int64) * BP + tl.arange(0, BP)  # n*W + w
    o_n, o_w = o_q // W, o_q % W
    m_q = o_q < Q
    o_o = tl.arange(0, BO)
    m_o = o_o < O * VO
    m = m_q[:, None] & m_o[None, :]
    o_k = tl.arange(0, 4 * BO)  # 4*o + r: three taps and an empty column, for blocks are powers of two
    m_k = (o_k % 4 < 3) & (o_k // 4 < O * VO)
    p_w = w + (((o_k // 4).to(tl.int64) * s_wo + o_k % 4 * s_wr) * VC)[None, :]
    o_rp, o_yp = o_n * s_rn + o_w * s_rw + o_r, o_n * s_yn + o_w * s_yw + o_y
    n_c = tl.cdiv(C * VC, BC)
    b_above = tl.zeros((BP, BO), tl.float32)  # of output row h - 1, without the row below it
    b_here = tl.zeros((BP, BO), tl.float32)  # of output row h, from the row above it
    for h in range(first - 1, last + 1):
        b_acc = tl.zeros((BP, 4 * BO), tl.float32)
        for i in range(tl.maximum(3 * n_c, 1)):  # never zero turns: see conv1x1
            s = i // n_c
            o_c = (i - s * n_c) * BC + tl.arange(0, BC)
            o_x0 = o_w + s - 1
            m_c = o_c < C * VC
            m_x = (m_q & (o_x0 >= 0) & (o_x0 < W) & (h >= 0) & (h < H))[:, None] & m_c[None, :]
            p_x = x + ((o_n * s_xn + h * s_xh.to(tl.int64) + o_x0 * s_xw + o_x) * VC)[:, None]
            b_x = tl.load(p_x + o_c[None, :], mask=m_x, other=0.0)
            b_w = tl.load(p_w + s * s_ws * VC + o_c[:, None], mask=m_c[:, None] & m_k[None, :], other=0.0)
            if PRO != "none" or scale is not None or shift is not None:
                b_x = tl.where(m_x, affine(b_x, scale, shift, o_c, m_c, PRO), 0.0).to(b_w.dtype)
            b_acc = accumulate(b_x, b_w, b_acc, PRECISION)
        b_even, b_odd = tl.split(tl.reshape(b_acc, (BP, BO, 2, 2)))  # taps 0 and 2, taps 1 and 3
        b_top, b_bottom = tl.split(b_even)
        b_middle, _ = tl.split(b_odd)
        if h > first:
            row = h - 1
            o_rr = ((o_rp + row * s_rh.to(tl.int64)) * VO)[:, None] + o_o[None, :]
            b_y = finished(b_above + b_bottom, bias, residual, o_rr, o_o, m_o, m, ACT)
            o_yr = ((o_yp + row * s_yh.to(tl.int64)) * VO)[:, None] + o_o[None, :]
            tl.store(y + o_yr, b_y.to(y.dtype.element_ty), mask=m)
        b_above = b_here + b_middle
        b_here = b_top


@launcher
def launch(call: Convolution) -> None:
    """One program a block of ``config.pixels`` (image, column) pairs and a strip of ``config.rows`` rows; all windows 1."""
    n, _, h, w = call.out.shape
    grid = (triton.cdiv(n * w, call.config.pixels) * triton.cdiv(h, call.config.rows),)
    rolling3x3_kernel[grid](
        *call.tensors, *call.starts, n * w, call.config.rows, h, w, *call.channels,
        *call.s_x, *call.s_w, *call.s_r, *call.s_y, **call.constants,
    )  # fmt: skip

"""A convolution of any small kernel as an implicit matrix product, with what surrounds it in a frozen network.

y[n, o, h, w] = act(sum_rsc z[n, c, h*S - P + r*D, w*S - P + s*D] * weight[o, c, r, s] + bias[o] + residual[n, o, h, w])
z = pro(x * scale + shift), and zero outside the image: the padding is that of z, not of x.
x, residual, y: (N, C, H, W), channels contiguous, other strides free; one dtype of fp16, bf16, fp32; weight: (O, C, R, S)
of that dtype, channels_last. Sums in fp32; z is rounded to x's dtype for the tensor cores. Every tap reads x anew,
through the L2 cache.
"""

import triton
import triton.language as tl

from fxfreeze.kernels.gpu.blocks import accumulate, affine, finished
from fxfreeze.kernels.gpu.convolution import Convolution, launcher

_SIZES = (
    "o_x o_r o_y P HY WY H W C O SH SW PH PW DH DW s_xn s_xh s_xw s_wo s_wr s_ws s_rn s_rh s_rw s_yn s_yh s_yw".split()
)


@triton.jit(do_not_specialize=_SIZES)
def conv3x3_kernel(
    x, w, bias, scale, shift, residual, y,
    o_x, o_r, o_y, P, HY, WY, H, W, C, O, SH, SW, PH, PW, DH, DW,
    s_xn, s_xh, s_xw, s_wo, s_wr, s_ws, s_rn, s_rh, s_rw, s_yn, s_yh, s_yw,
    KH: tl.constexpr, KW: tl.constexpr, PRO: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    VC: tl.constexpr, VO: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n_o = tl.cdiv(O * VO, BO)
    o_p = (tl.program_id(0) // n_o).to(tl.int64) * BP + tl.arange(0, BP)
    o_o = tl.program_id(0) % n_o * BO + tl.arange(0, BO)
    m_p, m_o = o_p < P, o_o < O * VO
    o_w, o_h, o_n = o_p % WY, o_p // WY % HY, o_p // WY // HY
    o_top, o_left = o_h * SH - PH, o_w * SW - PW
    p_w = w + (o_o.to(tl.int64) * s_wo * VC)[None, :]
    n_c = tl.cdiv(C * VC, BC)
    b_acc = tl.zeros((BP, BO), tl.float32)
    # One loop over taps and channels, so that loads run ahead across taps. Never zero turns: see conv1x1.
    for i in range(tl.maximum(KH * KW * n_c, 1)):
        tap = i // n_c
        r, s = tap // KW, tap % KW
        o_c = (i - tap * n_c) * BC + tl.arange(0, BC)
        o_y0, o_x0 = o_top + r * DH, o_left + s * DW
        m_c = o_c < C * VC
        m_x = (m_p & (o_y0 >= 0) & (o_y0 < H) & (o_x0 >= 0) & (o_x0 < W))[:, None] & m_c[None, :]
        p_x = x + ((o_n * s_xn + o_y0 * s_xh + o_x0 * s_xw + o_x) * VC)[:, None]
        b_x = tl.load(p_x + o_c[None, :], mask=m_x, other=0.0)
        b_w = tl.load(p_w + (r * s_wr + s * s_ws) * VC + o_c[:, None], mask=m_c[:, None] & m_o[None, :], other=0.0)
        if PRO != "none" or scale is not None or shift is not None:
            b_x = tl.where(m_x, affine(b_x, scale, shift, o_c, m_c, PRO), 0.0).to(b_w.dtype)
        b_acc = accumulate(b_x, b_w, b_acc, PRECISION)
    m = m_p[:, None] & m_o[None, :]
    o_rp = o_n * s_rn + o_h * s_rh + o_w * s_rw
    o_yp = o_n * s_yn + o_h * s_yh + o_w * s_yw
    b_y = finished(b_acc, bias, residual, ((o_rp + o_r) * VO)[:, None] + o_o[None, :], o_o, m_o, m, ACT)
    tl.store(y + ((o_yp + o_y) * VO)[:, None] + o_o[None, :], b_y.to(y.dtype.element_ty), mask=m)


@launcher
def launch(call: Convolution) -> None:
    """One program a block of ``config.pixels`` output pixels and ``config.outputs`` output channels."""
    n, o, h, w = call.out.shape
    grid = (triton.cdiv(n * h * w, call.config.pixels) * triton.cdiv(o, call.config.outputs),)
    conv3x3_kernel[grid](
        *call.tensors, *call.starts, n * h * w, h, w, *call.x.shape[2:], *call.channels,
        *call.stride, *call.padding, *call.dilation, *call.s_x, *call.s_w, *call.s_r, *call.s_y,
        KH=call.weight.shape[2], KW=call.weight.shape[3], **call.constants,
    )  # fmt: skip

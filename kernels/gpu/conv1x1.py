"""A 1x1 convolution as a matrix product, with what surrounds it in a frozen network.

y[n, o, h, w] = act(sum_c pro(x[n, c, s*h, s*w] * scale[c] + shift[c]) * weight[o, c] + bias[o] + residual[n, o, h, w])
x, residual, y: (N, C, H, W), channels contiguous, other strides free; one dtype of fp16, bf16, fp32; weight: (O, C, 1, 1)
of that dtype, C contiguous. Sums in fp32; the prologue's result is rounded to x's dtype for the tensor cores.
"""

import triton
import triton.language as tl

from fxfreeze.kernels.gpu.blocks import accumulate, affine, finished
from fxfreeze.kernels.gpu.convolution import Convolution, launcher
from fxfreeze.kernels.gpu.operands import flat

_SIZES = (
    "o_x o_r o_y P H W C O s_xn s_xh s_xw s_w s_rn s_rh s_rw s_yn s_yh s_yw".split()  # never worth a compilation
)


@triton.jit(do_not_specialize=_SIZES)
def conv1x1_kernel(
    x, w, bias, scale, shift, residual, y,
    o_x, o_r, o_y, P, H, W, C, O, s_xn, s_xh, s_xw, s_w, s_rn, s_rh, s_rw, s_yn, s_yh, s_yw,
    PRO: tl.constexpr, ACT: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    VC: tl.constexpr, VO: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n_o = tl.cdiv(O * VO, BO)
    pid_o = tl.program_id(0) % n_o  # neighbours read the same pixels, which the L2 cache then holds
    o_p = (tl.program_id(0) // n_o).to(tl.int64) * BP + tl.arange(0, BP)
    o_o = pid_o * BO + tl.arange(0, BO)
    m_p, m_o = o_p < P, o_o < O * VO
    if FLAT:
        o_xp, o_rp, o_yp = o_p * s_xw, o_p * s_rw, o_p * s_yw
    else:
        o_w, o_h, o_n = o_p % W, o_p // W % H, o_p // W // H
        o_xp = o_n * s_xn + o_h * s_xh + o_w * s_xw
        o_rp = o_n * s_rn + o_h * s_rh + o_w * s_rw
        o_yp = o_n * s_yn + o_h * s_yh + o_w * s_yw
    p_x = x + ((o_xp + o_x) * VC)[:, None]
    p_w = w + (o_o.to(tl.int64) * s_w * VC)[None, :]
    b_acc = tl.zeros((BP, BO), tl.float32)
    # Never zero turns: with a way round the loop, ptxas would make Hopper's products wait for one another.
    for i in range(tl.maximum(tl.cdiv(C * VC, BC), 1)):
        o_c = i * BC + tl.arange(0, BC)
        m_c = o_c < C * VC
        b_x = tl.load(p_x + o_c[None, :], mask=m_p[:, None] & m_c[None, :], other=0.0)
        b_w = tl.load(p_w + o_c[:, None], mask=m_c[:, None] & m_o[None, :], other=0.0)
        if PRO != "none" or scale is not None or shift is not None:
            b_x = affine(b_x, scale, shift, o_c, m_c, PRO).to(b_w.dtype)
        b_acc = accumulate(b_x, b_w, b_acc, PRECISION)
    m = m_p[:, None] & m_o[None, :]
    b_y = finished(b_acc, bias, residual, ((o_rp + o_r) * VO)[:, None] + o_o[None, :], o_o, m_o, m, ACT)
    tl.store(y + ((o_yp + o_y) * VO)[:, None] + o_o[None, :], b_y.to(y.dtype.element_ty), mask=m)


@launcher
def launch(call: Convolution) -> None:
    """One program a block of ``config.pixels`` output pixels and ``config.outputs`` output channels; no padding."""
    n, o, h, w = call.out.shape
    pixels, (s_n, s_h, s_w) = n * h * w, call.s_x
    is_flat = tuple(call.stride) == (1, 1) and flat(call.x, call.residual, call.out)
    grid = (triton.cdiv(pixels, call.config.pixels) * triton.cdiv(o, call.config.outputs),)
    conv1x1_kernel[grid](
        *call.tensors, *call.starts, pixels, h, w, *call.channels,
        s_n, s_h * call.stride[0], s_w * call.stride[1], call.s_w[0], *call.s_r, *call.s_y,
        FLAT=is_flat, **call.constants,
    )  # fmt: skip

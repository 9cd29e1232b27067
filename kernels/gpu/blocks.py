"""Device functions on blocks of values, shared by the kernels.

Arithmetic in fp32. ``ACT`` is a name of ``reference.ACTIVATIONS``; NaN goes through every activation, as in PyTorch.
"""

import triton
import triton.language as tl

# The interpreter multiplies bf16 blocks wrongly (numpy has no such type), so there both sides are widened first.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def activation(b, ACT: tl.constexpr):
    if ACT == "relu":
        return tl.where(b < 0, 0.0, b)
    elif ACT == "relu6":
        return clamped(b, 6.0)
    elif ACT == "silu":
        return b / (1 + tl.exp(-b))
    elif ACT == "hardswish":
        return b * clamped(b + 3, 6.0) / 6
    elif ACT == "gelu":
        return 0.5 * b * (1 + tl.math.erf(b * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2 / pi) (b + 0.044715 b^3)
        return b / (1 + tl.exp(-1.5957691216057308 * (b + 0.044715 * b * b * b)))
    else:
        tl.static_assert(ACT == "none", "no such activation")
        return b


@triton.jit
def clamped(b, top):
    return tl.where(b < 0, 0.0, tl.where(b > top, top, b))


@triton.jit
def affine(b, scale, shift, o_c, m_c, ACT: tl.constexpr):
    """``act(b * scale + shift)`` of a block (pixels, channels), fp32; without ``scale`` and ``shift``, ``act(b)``."""
    b = b.to(tl.float32)
    if scale is not None:
        b *= tl.load(scale + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        b += tl.load(shift + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return activation(b, ACT)


@triton.jit
def accumulate(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    """``b_acc + b_a @ b_b`` in fp32. PRECISION: how fp32 operands are multiplied, "ieee" or "tf32"."""
    if INTERPRETED and b_a.dtype == tl.bfloat16:
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_acc, input_precision="ieee")
    else:
        return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)


@triton.jit
def finished(b_acc, bias, residual, o_r, o_c, m_c, m, ACT: tl.constexpr):
    """The epilogue ``act(b_acc + bias + residual)`` of a block (pixels, channels); ``o_r``: addresses in ``residual``."""
    if bias is not None:
        b_acc += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        b_acc += tl.load(residual + o_r, mask=m, other=0.0).to(tl.float32)
    return activation(b_acc, ACT)

"""Bytes, seconds and dtypes as people write them."""

import torch

__all__ = ["bytes_text", "change_text", "dtype_text", "seconds_text"]


def bytes_text(count: float) -> str:
    """A kB is 1000 bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds_text(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def change_text(share: float) -> str:
    """A relative change in percent, signed if it is one."""
    text = f"{share:+.0%}"
    return "0%" if text in ("+0%", "-0%") else text


def dtype_text(dtype: torch.dtype) -> str:
    """Without its package."""
    return str(dtype).removeprefix("torch.")

"""Memory as bytes: a tensor's, and files', mapped read-only; and zeros that take no memory until written."""

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Region", "sparse_zeros", "tensor_bytes"]

_ADDRESSES = 2**46  # bytes, half of what a process has
_HUGE_PAGE = 2**21
# Linux's MAP_FIXED and MAP_NORESERVE, which Python 3.11 does not name.
_FIXED = 0x10
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; valid while the tensor lives."""
    return _view(tensor.data_ptr(), tensor.nbytes)[0] if tensor.nbytes else memoryview(bytearray())


class Region:
    """Address space in which files are mapped read-only, one after the other, so that one gather reaches all their rows.

    data: (capacity,) uint8. Only the mapped files in it may be touched, and none of it written. The capacity is in
    virtual bytes: what is not mapped costs nothing. OSError.
    """

    def __init__(self, capacity: int) -> None:
        if capacity > _ADDRESSES:
            raise OSError(errno.ENOMEM, "no address space for that many bytes")
        self._capacity = _rounded(capacity)
        self._next = 0
        reserved = _map(None, self._capacity + _HUGE_PAGE, 0, _ANONYMOUS, -1)
        self._base = _rounded(reserved)
        view, owner = _view(self._base, self._capacity)
        self.view = view.toreadonly()
        self.data = torch.frombuffer(owner, dtype=torch.uint8)
        weakref.finalize(owner, _libc.munmap, reserved, self._capacity + _HUGE_PAGE).atexit = False

    @staticmethod
    def needed(sizes: Iterable[int]) -> int:
        """The capacity that files of these sizes take."""
        return sum(map(_rounded, sizes))

    def fits(self, sizes: Iterable[int]) -> bool:
        return self._next + self.needed(sizes) <= self._capacity

    def map(self, descriptor: int, size: int) -> int:
        """Where in the region the first `size` > 0 bytes of an open file are now. OSError."""
        start = self._next
        if not self.fits([size]):
            raise OSError(errno.ENOMEM, "the region is full")
        # At a huge page's start, where the system can map a file by huge pages: to gather rows of 32 KiB then takes
        # a third less time. Python's own mmap would keep a descriptor for each, and there may be more shards than those.
        _map(self._base + start, size, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, descriptor)
        self._next += _rounded(size)
        return start


def sparse_zeros(count: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """(count,) zeros in pages that exist once written: a manifest that states 2**40 samples costs nothing."""
    pages = mmap.mmap(-1, dtype.itemsize * max(1, count), flags=_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)[:count]


def _rounded(size: int) -> int:
    return -(-size // _HUGE_PAGE) * _HUGE_PAGE


def _map(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    result = _libc.mmap(address, size, protection, flags, descriptor, 0)
    if result == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


def _view(address: int, size: int) -> tuple[memoryview, ctypes.Array[ctypes.c_ubyte]]:
    array = (ctypes.c_ubyte * size).from_address(address)
    return memoryview(array).cast("B"), array

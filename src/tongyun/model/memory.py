"""Memory for tensors that every step reads from end to end.

With pages of 4 KiB the processor spends part of such a read on finding pages; with
large ones it reads about a tenth faster. Knows no model.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

_MADV_HUGEPAGE = 14
_PAGE = 2 * 2**20


def empty_for_streaming(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor, on large pages where the system gives them to those who ask."""
    tensor = torch.empty(shape, dtype=dtype)
    if sys.platform == "linux" and tensor.nbytes >= 2 * _PAGE:
        begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
        # Only advice: where it is refused the memory is as good as any.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)
    return tensor

"""The policy's inner loops: block FP8, grouped expert products, permutation, router, log-probs.

One file per operation holds its plain torch form, which is the reference and the path on a CPU, and the public
function. Tensors on a CUDA device go to the Triton source in `triton_*.py` instead. The numbers all of them must
produce are written down in docs/numerics.md.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def runs_triton(x: Tensor) -> bool:
    """Whether operations on `x` run their Triton source: on a CUDA device, or in Triton's interpreter."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"

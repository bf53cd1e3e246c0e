"""The same checks on a GPU, where the compiled kernels run."""

import os

import pytest
import torch
from test_interpreter import run_checks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the compiled kernels have never run here")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set: nothing is compiled")
def test_the_compiled_kernels_agree_with_their_references():
    run_checks(TRITON_INTERPRET="0")

"""Each worker sees its own device, by the variable that this device is named in."""

import os

import pytest


@pytest.mark.parametrize("number", range(4))
def test_device(number: int, gpu_share) -> None:  # noqa: ARG001 - so that each worker gets one
    if gpu_share.role != "gpu":
        pytest.skip("this process was given no GPU")
    shown = os.environ["CUDA_VISIBLE_DEVICES"] or os.environ["ROCR_VISIBLE_DEVICES"]
    assert shown == gpu_share.device

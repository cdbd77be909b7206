import pytest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [8, 16, 32])
def test_forward(dtype, heads, train):
    train(heads / (10 if dtype == "float32" else 18), 2.5)


@pytest.mark.parametrize("heads", [8, 16, 32])
def test_backward(heads, train):
    train(heads / 9, 3.9)


def test_causal_mask(train):
    train(0.8, 1.4)

import pytest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [8, 16, 32])
def test_forward(dtype, heads, train):
    train(heads / (10 if dtype == "float32" else 18), 0.9)


@pytest.mark.parametrize("heads", [8, 16, 32])
def test_backward(heads, train):
    train(heads / 9, 1.4)


def test_causal_mask(train):
    train(0.8, 0.5)

import pytest


@pytest.mark.parametrize("rows", [10_000, 50_000, 250_000])
def test_lookup(rows, train):
    train(0.4 + rows / 120_000, 2.2)


def test_gradients_are_sparse(train):
    train(1.9, 3.4)


def test_cache_is_bounded(train, keep):
    train(1.2, 2.0)
    keep(0.4)


@pytest.mark.skip(reason="needs two GPUs")
def test_sharded():
    pass

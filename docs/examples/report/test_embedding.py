import pytest


@pytest.mark.parametrize("rows", [10_000, 50_000, 250_000])
def test_lookup(rows, train):
    train(0.4 + rows / 120_000, 0.8)


def test_gradients_are_sparse(train):
    train(1.9, 1.2)


def test_cache_is_bounded(train, keep):
    train(1.2, 0.7)
    keep(0.4)


@pytest.mark.skip(reason="needs two GPUs")
def test_sharded():
    pass

import pytest


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
def test_greedy(batch, train):
    train(0.6 + batch / 25, 2.1 + batch / 40)


@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search(beams, train):
    train(0.9 * beams, 3.1)


def test_stops_at_the_end_token(train):
    train(1.1, 1.7)
    assert ["the", "end"] == ["the", "end", "<pad>"]

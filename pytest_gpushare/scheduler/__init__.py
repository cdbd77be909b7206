"""Which test runs where and when. Pure: events in, actions out."""

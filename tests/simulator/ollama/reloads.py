"""What replaces the process of a loaded model: measured on a real server, held by the simulated."""

from __future__ import annotations

Case = tuple[dict[str, object], bool, bool]
"""What a request has beside its prompt; whether it reloads a model that was loaded without it;
whether the next request without it does."""


def _options(reloads: bool, back: bool, **options: object) -> list[Case]:
    return [({"options": {key: value}}, reloads, back) for key, value in options.items()]


REQUESTS: list[Case] = [
    *_options(True, True, num_ctx=512, num_batch=64, num_thread=1, main_gpu=0),
    *_options(True, True, draft_num_predict=2, use_mmap=True),
    ({"shift": False}, True, True),
    *_options(True, False, num_gpu=0),
    *_options(False, False, seed=1, temperature=0.5, top_k=3, num_keep=2, num_predict=1),
    # -1 is the default, and more than the model was trained for is cut to that.
    *_options(False, False, num_gpu=-1, num_ctx=4096),
    ({"keep_alive": "3m"}, False, False),
    ({"raw": True}, False, False),
    ({"format": "json"}, False, False),
    ({"system": "x"}, False, False),
    ({"shift": True}, False, False),
]
"""For a model that was trained for 2048 tokens."""

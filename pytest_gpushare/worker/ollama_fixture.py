"""The fixture `ollama`: where a test finds its model, and the options with which to call it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpushare.scheduler.needs import ModelUse
from pytest_gpushare.worker.collection import MarkerReader
from pytest_gpushare.worker.plugin import TESTS

if TYPE_CHECKING:
    from pytest_gpushare.ollama.address import Address
    from pytest_gpushare.wire import Link

SEED = 42
"""The seed in `options`."""

ANSWER = "ollama-answer"
"""The kind of message with what a recorded answer says."""

_LIMIT = 5.0
"""Seconds for the question whether server and model are there."""


class OllamaForTest:
    """Ollama as one test uses it."""

    def __init__(self, url: str, use: ModelUse, nodeid: str, link: Link | None) -> None:
        """`link`: to the controller; None without one."""
        self.base_url = url
        """`http://127.0.0.1:11434`: for the package `ollama`, and for httpx."""
        self.openai_base_url = f"{url}/v1"
        """For clients of OpenAI's; the server wants no key, and the client any text."""
        self.context: int | None = use.context or None
        """Tokens of context, where the test declares them; None: those of the server."""
        self.options: dict[str, Any] = {"temperature": 0, "seed": SEED}
        """For native calls; each call of a test with these, as another context would have the
        server load the model again."""
        if use.context:
            self.options["num_ctx"] = use.context
        self._use, self._nodeid, self._link = use, nodeid, link

    @property
    def model(self) -> str:
        """The name of the model; the test fails where nobody says which."""
        if not self._use.model:
            pytest.fail(
                f"{self._nodeid} names no model: @pytest.mark.ollama(model=...), a line of "
                "gpu_share_ollama_tests, or a single model in gpu_share_ollama_models",
                pytrace=False,
            )
        return self._use.model

    def record(self, answer: Any) -> Any:
        """Count the tokens of an answer, for the summary and the report; returns the answer.

        An answer of the package `ollama`, of OpenAI's client, an `httpx.Response`, or a mapping
        of Ollama's JSON; anything else counts as nothing.
        """
        tokens, seconds = tokens_of(answer)
        if tokens and self._link is not None:
            self._link.send(ANSWER, {"test": self._nodeid, "tokens": tokens, "seconds": seconds})
        return answer


def tokens_of(answer: Any) -> tuple[int, float]:
    """(tokens, seconds) that an answer says it took to generate; 0 for what it does not say."""
    try:
        if not isinstance(answer, Mapping) and callable(getattr(answer, "json", None)):
            decoded = answer.json() if hasattr(answer, "status_code") else None
            answer = decoded if isinstance(decoded, Mapping) else answer
        usage = _part(answer, "usage")
        tokens = _part(answer, "eval_count")
        if tokens is None and usage is not None:
            tokens = _part(usage, "completion_tokens")
        nanoseconds = _part(answer, "eval_duration")
    except Exception:
        # The answer is an object of somebody else's.
        return 0, 0.0
    count = tokens if type(tokens) is int and 0 < tokens < 10**9 else 0
    took = nanoseconds / 1e9 if type(nanoseconds) is int and 0 < nanoseconds < 10**16 else 0.0
    return count, took


def _part(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def ollama_for(request: pytest.FixtureRequest) -> OllamaForTest:
    """The fixture's value; skips or fails the test where server or model are missing."""
    config, item = request.config, request.node
    message, link = config.stash.get(TESTS, (None, None))
    if message is None:
        message = _without_controller(config)
    facts = message["ollama"]
    use = MarkerReader(message).model_of(item)
    if use is None or not facts.get("dispatched"):
        _check(use or ModelUse(model=facts["only_model"]), facts)
    return OllamaForTest(
        facts["url"], use or ModelUse(model=facts["only_model"]), item.nodeid, link
    )


def _without_controller(config: pytest.Config) -> Mapping[str, Any]:
    """What the settings say, in a run that does not ask for the plugin."""
    from pytest_gpushare.config.sources import gather, load
    from pytest_gpushare.ollama.address import candidates
    from pytest_gpushare.planning.placement import message_of_models

    settings = load(gather(config))
    address = candidates(settings.ollama_host, os.environ)[0].address
    return {
        "marker": settings.marker,
        "aliases": [tuple(alias) for alias in settings.markers],
        "rules": [],
        "gpu_unless_marked": False,
        "ollama": {**message_of_models(settings), "url": address.url},
    }


def _check(use: ModelUse, facts: Mapping[str, Any]) -> None:
    """Skip or fail, as the settings say, where the server or the model is missing."""
    how = facts["without"]
    if how == "run":
        return
    from pytest_gpushare.ollama.address import parse_address

    problem = missing(parse_address(facts["url"]), use.model)
    if problem:
        text = f"{problem} (gpu_share_without_ollama = {how})"
        if how == "skip":
            pytest.skip(text)
        pytest.fail(text, pytrace=False)


def missing(server: Address, model: str) -> str:
    """Why a test cannot use this model; empty where it can. No model: the server alone counts."""
    from pytest_gpushare.ollama.catalog import ask, ask_models
    from pytest_gpushare.ollama.client import load

    # Imported now, so that its cost counts against no limit.
    load()
    found = ask(server, _LIMIT)
    if not found.answered:
        return f"no Ollama at {server.shown}: {found.problem}"
    if not model:
        return ""
    facts = ask_models(server, [model], time.monotonic() + _LIMIT, lambda _: None)
    return f"no model {model} at {server.shown}" if facts and facts[0].is_missing else ""

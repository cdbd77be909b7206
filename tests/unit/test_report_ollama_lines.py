"""What is said of Ollama's models after a run, from its answers."""

from __future__ import annotations

import pytest

from pytest_gpushare.events import Record
from pytest_gpushare.ollama.models import LoadedModel
from pytest_gpushare.ollama.monitor import MonitoredServer
from pytest_gpushare.report.ollama_lines import verdict
from pytest_gpushare.units import GB

from .test_ollama_spill import device, promise

WHOLE = LoadedModel("m", 8 * GB, 8 * GB, "d", 4096)
SPILLED = WHOLE._replace(size_vram=6 * GB)
UNTOLD = WHOLE._replace(size_vram=None)


class Answers:
    """A server and a clock: each answer comes five seconds after the one before."""

    def __init__(self, *models: LoadedModel) -> None:
        self._now = 0.0
        held = {"GPU-0": device({"gw0": 12}, ollama=8)}
        record = Record(lambda: self._now)
        self.server = MonitoredServer(models, promise(), lambda _models, _by_worker: held, record)

    def then(self, *answers: LoadedModel | None) -> Answers:
        """None: it does not answer."""
        for answer in answers:
            self._now += 5.0
            if answer is None:
                self.server.silence("no answer", certain=True)
            else:
                self.server.answer([answer])
        return self

    def words(self) -> list[str]:
        self._now += 5.0
        self.server.end()
        return ["; ".join((each.text, *each.details)) for each in verdict(self.server)]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (
            Answers(WHOLE).then(WHOLE),
            "NVML shows 2.0 GB of it: a part of it may be on the CPU",
        ),
        (Answers(UNTOLD).then(UNTOLD), "Ollama held m"),
        (Answers(WHOLE).then(SPILLED, WHOLE), "by the end all of it was on the GPU again (8.0 GB)"),
        (
            Answers(WHOLE).then(SPILLED, SPILLED._replace(context=8192, size=30 * GB)),
            "and in part 1 more times",
        ),
        (Answers(SPILLED).then(WHOLE), "since a reload; before the tests a part of it was on"),
        (Answers(WHOLE).then(None, WHOLE), "from 0 s into the run to 10 s: what happened"),
        (Answers(WHOLE).then(WHOLE, None), "from 5 s into the run to its end: what happened"),
    ],
)
def test_verdict(answers: Answers, words: str) -> None:
    found = answers.words()
    assert any(words in each for each in found), found

"""Reports on disk and what must not be in them; GitHub's table and annotations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpushare.config.sources import report_files
from pytest_gpushare.errors import SettingsError
from pytest_gpushare.gpu.devices import GpuFacts, HostFacts
from pytest_gpushare.ollama.models import OLLAMA, OllamaFacts
from pytest_gpushare.planning.plan import Request
from pytest_gpushare.planning.startup import plan_run
from pytest_gpushare.report.output import Line
from pytest_gpushare.report.publish import write_reports
from pytest_gpushare.report.results import Results
from pytest_gpushare.report.summary import escaped, step_summary, workflow_commands
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.start_facts import StartFacts
from pytest_gpushare.text import redacted, redactor, write_whole
from pytest_gpushare.units import GB

from .scene import Scene
from .test_planning_sizing import DEFAULTS

SECRETS = {
    "HF_TOKEN": "hf_abcdefghij",
    "DB_PASSWORD": "correct horse",
    "OPENAI_API_KEY": "sk-0123456789",
    "SHORT_TOKEN": "gpu",
    "PATH": "/usr/bin:/bin",
    "PGPASSWORD": "postgres-secret",
    "GIT_AUTHOR_NAME": "test_user",
    "GIT_COMMITTER_NAME": "test_user",
    "TOKENIZERS_PARALLELISM": "tokenizers",
    "XAUTHORITY": "/run/user/1000/xauth",
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("test_a.py::test_x[hf_abcdefghij]", "test_a.py::test_x[***]"),
        ("a correct horse, sk-0123456789", "a ***, ***"),
        ("gpu 0 in /usr/bin:/bin", "gpu 0 in /usr/bin:/bin"),
        ("http://me:pass@gpu-box:11434/x", "http://***@gpu-box:11434/x"),
        ("https://gpu-box/api?token=abc&x=1 failed", "https://gpu-box/api?*** failed"),
        ("https://gpu-box/#abc", "https://gpu-box/?***"),
        ("changed by /home/ada/suite/conftest.py", "changed by ~/suite/conftest.py"),
        ("test_a.py::test[a@b?c]", "test_a.py::test[a@b?c]"),
        ("tests/test_user.py::test_tokenizers", "tests/test_user.py::test_tokenizers"),
        ("postgres-secret", "***"),
        (
            "/home/ada2/x, /home/ada.old, /mnt/home/ada/x",
            "/home/ada2/x, /home/ada.old, /mnt/home/ada/x",
        ),
        ("in /home/ada. And '/home/ada'", "in ~. And '~'"),
        ("file:///home/ada/x:/home/ada/y", "file://~/x:~/y"),
    ],
)
def test_secrets_are_taken_out(text: str, shown: str) -> None:
    clean = redactor(SECRETS, "/home/ada")
    assert clean(text) == shown
    assert redacted({"a": [{text: text}], "n": [1, None], "f": 0.5}, clean) == {
        "a": [{shown: shown}],
        "n": [1, None],
        "f": 0.5,
    }


def test_names_of_reports(tmp_path: Path) -> None:
    found = report_files(["a.json", "sub/b.HTML", "a.json", str(tmp_path / "c.html")], tmp_path)
    assert found == (tmp_path / "a.json", tmp_path / "sub" / "b.HTML", tmp_path / "c.html")
    assert report_files(None, tmp_path) == ()
    for name in ("report", "report.xml", "json", ""):
        with pytest.raises(SettingsError, match=r"allowed is a file that ends in \.json or \.html"):
            report_files([name], tmp_path)


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up leaves the old file, and no scratch file."""
    path = tmp_path / "deep" / "run.json"
    write_whole(path, "old")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    problem = f"no report in {path}: no space left on device"
    assert write_reports({}, [path]) == {path: problem}
    assert [entry.name for entry in path.parent.iterdir()] == ["run.json"]
    assert path.read_text() == "old"


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "d.json").mkdir()
    (tmp_path / "file").write_text("")
    paths = [tmp_path / "d.json", tmp_path / "file" / "x.json", tmp_path / "ok.json"]
    told = list(write_reports({"schema": 1, "a": float("nan")}, paths[2:]).values())
    assert len(told) == 1
    assert told[0].startswith(f"no report in {paths[2]}: ")
    first, second = write_reports({"schema": 1}, paths).values()
    assert first == f"no report in {paths[0]}: d.json is a directory"
    assert second.startswith(f"no report in {paths[1]}: ")
    assert (tmp_path / "ok.json").read_text() == '{"schema":1}\n'


@given(st.text(max_size=40))
def test_no_text_means_anything_to_markdown(text: str) -> None:
    shown = escaped(text)
    left = shown
    for number in range(10):
        left = left.replace(str(number), "")
    assert not set(left) & set("`*_{}[]<>#+!|~\\\r\n\"'@-") - set("&#;")
    assert "\n" not in shown


def test_github_table_without_a_gpu() -> None:
    settings, nothing = DEFAULTS, GpuFacts(absence="NVML library not found")
    plan = plan_run(settings, nothing, {OLLAMA: OllamaFacts()}, HostFacts(8), Request())
    run = ActiveRun(StartFacts(settings, nothing, {}, plan))
    assert "| NVML library not found | | | | | |" in step_summary(Results(run), [])


def test_github_table() -> None:
    run = Scene()
    run.ran("test.py::x[<b>|*`a`]", 0, 3, holds=3.0)
    text = step_summary(
        Results(run.finish()),
        [
            Line("gpu-share: a | b", problem=True),
            Line("gpu-share: Ollama kept m on the GPU", mark="green"),
            Line("fine"),
        ],
    )
    assert text.splitlines() == [
        "### gpu-share",
        "",
        "| device | VRAM peak | of | tests, peak | usable for tests | GPU workers |",
        "|---|---|---|---|---|---|",
        "| GPU 0 card | at least 5.0 GB | 24.0 GB | at least 3.0 GB | 9.0 GB | 2 |",
        "",
        "| test | VRAM |",
        "|---|---|",
        "| test.py::x&#91;&#60;b&#62;&#124;&#42;&#96;a&#96;&#93; | at least 3.0 GB |",
        "",
        "- gpu&#45;share: a &#124; b",
        "- gpu&#45;share: Ollama kept m on the GPU",
        "",
    ]


def test_annotations() -> None:
    """Spills and leaks; what a user wrote cannot end a command or begin one."""
    run = Scene()
    run.ran("a,b%.py::test[\n::error::x]", 0, counted={"peak": GB, "left": GB})
    run.active.record.note("ollama-spilled", "spilled 100 %\r\nbadly")
    assert list(workflow_commands(Results(run.finish()))) == [
        "::warning title=gpu-share%3A Ollama::spilled 100 %25%0D%0Abadly",
        "::warning file=a%2Cb%25.py,title=gpu-share%3A VRAM left behind::"
        "a,b%25.py::test[?::error::x] left 1.0 GB of VRAM behind (gw0)",
    ]


def document_of(run: Scene) -> dict[str, Any]:
    from pytest_gpushare.report.document import document

    return document(Results(run.finish()), 0, [])


def test_unknown_is_null_never_0() -> None:
    """Where NVML tells nothing by process and no framework counts."""
    run = Scene()
    run.card.silent = True
    run.ran("t::a", 0, 3, holds=5)
    told = document_of(run)
    (device,) = told["devices"]
    assert (device["peak_used_bytes"], device["peak_workers_bytes"]) == (7 * GB, None)
    assert [worker["peak_bytes"] for worker in told["workers"]] == [None, None]
    assert [test["peak_bytes"] for test in told["tests"]] == [None]
    (samples,) = told["samples"]["devices"].values()
    assert set(samples["ollama_bytes"]) == set(samples["others_bytes"]) == {None}
    assert samples["workers_bytes"] == {}

"""Names of report files: what stands in braces, and what is refused."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from pytest_gpushare.config.sources import job_name, report_files
from pytest_gpushare.errors import SettingsError

HERE = Path("/here")


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "CI_JOB_ID": "9"}, "7-1"),
        ({"JOB_COMPLETION_INDEX": "0"}, "0"),
        ({"BUILDKITE_JOB_ID": "018-ab"}, "018-ab"),
        ({"CI_JOB_ID": "../../x y"}, "-..-x-y"),
        ({"GITHUB_RUN_ID": "5", "GITHUB_JOB": "tests", "RUNNER_NAME": "gpu 1"}, "5-tests-gpu-1"),
    ],
)
def test_job_name(environment: dict[str, str], name: str) -> None:
    assert job_name(environment) == name


def test_job_name_outside_of_a_job_is_the_process() -> None:
    assert job_name({}).isdigit()


def test_host_and_job_stand_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "box/1.example.org")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    found = report_files(["r-{host}-{job}.json", "{other}.html"], HERE)
    assert found == (HERE / "r-box-1-7.json", HERE / "{other}.html")


def test_a_home_that_does_not_exist() -> None:
    with pytest.raises(
        SettingsError, match=r"--gpu-share-report ~nobody-here/r.json: no such home"
    ):
        report_files(["~nobody-here/r.json"], HERE)

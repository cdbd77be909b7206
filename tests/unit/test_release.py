"""What a release says of itself: one version everywhere, and the files that its tests need."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HOST = "readthedocs.io"


def test_one_version() -> None:
    """The package, the newest section of the changelog, and the citation."""
    version = PROJECT["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", changelog, re.M)
    assert found is not None
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert found[1] == version
    assert f"version: {version}\n" in citation
    assert f'date-released: "{found[2]}"' in citation


def test_the_sdist_has_what_is_named() -> None:
    """Each file or folder that the sdist takes is there, and the tests are among them."""
    names = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert [name for name in names if not (ROOT / name.lstrip("/")).exists()] == []
    assert {"/tests", "/docs", "/pytest_gpushare", "/tox.ini"} <= set(names)


def test_addresses() -> None:
    """doctor's findings link into the documentation, whose address stands in the metadata."""
    addresses = PROJECT["project"]["urls"]
    assert {"Documentation", "Changelog", "Source", "Issues"} <= set(addresses)
    assert all(address.startswith("https://") for address in addresses.values())
    assert addresses["Documentation"] == f"https://{PROJECT['project']['name']}.{HOST}/en/latest"
    assert addresses["Changelog"].startswith(addresses["Documentation"])
    builder = (ROOT / ".readthedocs.yaml").read_text(encoding="utf-8")
    found = re.search(r"configuration: (\S+)", builder)
    assert found is not None
    assert (ROOT / found[1]).exists()


def test_links_of_the_readme() -> None:
    """Each leads to a file that is there, and on a package index to that file's address."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    inside = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert len(inside) > 10
    assert [name for name in inside if not (ROOT / name).exists()] == []
    for each in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    assert re.findall(r"\]\((?!https://)[^)]+\)", text) == []
    assert "/pytest-gpushare/v$HFPR_VERSION/docs/images/report-light.png)" in text

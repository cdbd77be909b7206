"""Every way to ask for the plugin, and every way to be left alone by it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
from simulator import Device, Machine
from simulator.ollama import OllamaServer

from .conftest import SHOW_PLACE, XDIST_HAS_PX, Project, closed_port
from .in_one_process import Case, arguments, run_all

TWO = (
    "gpu-share: 2 GPU workers × 4.5 GB = 9.0 GB "
    "(limited by max_workers_per_gb; preset conservative)"
)
ONE = "gpu-share: 1 GPU worker × 9.0 GB = 9.0 GB (limited by -n 1; preset conservative)"
PYTEST_9 = pytest.mark.skipif(pytest.version_tuple < (9,), reason="files of pytest 9")


FORMS = [
    (["--gpu-share"], TWO, 2),
    (["-n", "gpu-auto"], TWO, 2),
    (["-ngpu-auto"], TWO, 2),
    (["--numprocesses=gpu-auto"], TWO, 2),
    (["-n", "gpu-auto", "--gpu-share"], TWO, 2),
    (["--gpu-share", "-n", "1"], ONE, 1),
    (["-n", "gpu-auto", "-n", "1", "--gpu-share"], ONE, 1),
    (["--gpu-share", "-n", "2"], TWO, 2),
    (["--gpu-share", "-n", "8"], TWO, 2),
    (["--gpu-share", "-n", "auto"], TWO, 2),
    (["--gpu-share", "-n", "logical"], TWO, 2),
    (["--gpu-share", "--maxprocesses", "1"], ONE.replace("-n 1", "--maxprocesses 1"), 1),
    (["--gpu-share", "-d"], TWO, 2),
    (["--gpu-share", "--dist", "no"], TWO, 2),
    (["--gpu-share", "--dist", "worksteal"], TWO, 2),
    (["--gpu-share", "--dist", "loadscope"], TWO, 2),
    (["--gpu-share", "--dist", "loadfile"], TWO, 2),
    (["--gpu-share", "--dist", "loadgroup"], TWO, 2),
    (["--gpu-share", "--tx", "5*popen", "-n", "3"], TWO, 2),
    (["--no-gpu-share", "--gpu-share"], TWO, 2),
    (["-n", "gpu-auto", "-p", "no:terminal"], None, 2),
]


def test_asked(project: Project, machine: Machine) -> None:
    """What is planned and started is the same, whatever the form of the question."""
    cases = {" ".join(form): arguments(*form) for form, _, _ in FORMS}
    ended = run_all(cases, project.path, project.environment)
    place = f"gpu {machine.snapshot()[0].uuid}"
    assert {
        form: (it.code, it.err, it.said[0] if it.said else None, it.places)
        for form, it in ended.items()
    } == {" ".join(form): (0, "", said, [place] * workers) for form, said, workers in FORMS}


@pytest.mark.parametrize(
    ("arguments", "said", "workers"),
    [
        (["-n", "gpu-auto"], TWO, 2),
        (["--gpu-share", "--tx", "5*popen", "-n", "3"], TWO, 2),
        (["-n", "gpu-auto", "-p", "no:terminal"], None, None),
    ],
)
def test_asked_with_workers(
    arguments: list[str], said: str | None, workers: int | None, project: Project, machine: Machine
) -> None:
    """The workers are started, and where they were to be placed they are."""
    project.write(test_project=SHOW_PLACE)
    result = project.pytest(*arguments)
    assert (result.code, result.err) == (0, "")
    assert (result.said[0] if result.said else None) == said
    assert result.workers == workers
    places = set(project.places().values())
    assert places == {f"gpu {machine.snapshot()[0].uuid}"}


def test_not_asked(project: Project, machine: Machine) -> None:
    """The plugin says nothing, asks nobody and starts what stock xdist starts."""
    machine.inject("nvmlInitWithFlags", code=999)
    forms = [
        ([], 0),
        (["-n", "2"], 2),
        (["--no-gpu-share"], 0),
        (["--gpu-share", "--no-gpu-share", "-n", "1"], 1),
        (["-n", "gpu-auto", "-n", "1"], 1),
        (["-n", "gpu-auto", "-n", "0"], 0),
        (["-n", "0"], 0),
    ]
    cases = {" ".join(form): arguments(*form) for form, _ in forms}
    ended = run_all(cases, project.path, project.environment)
    # A run in this process passes its test.
    assert {
        form: (it.code, it.err, it.said, it.places, it.passed, it.loaded)
        for form, it in ended.items()
    } == {
        " ".join(form): (0, "", [], ["unset unset"] * workers, int(not workers), [])
        for form, workers in forms
    }


@pytest.mark.parametrize(("arguments", "workers"), [([], None), (["-n", "2"], 2)])
def test_not_asked_changes_nothing(
    arguments: list[str], workers: int | None, project: Project, machine: Machine
) -> None:
    """Neither in this process nor in workers is a variable set."""
    project.write(test_project=SHOW_PLACE)
    result = project.pytest(*arguments)
    assert (result.code, result.err, result.said, result.workers) == (0, "", [], workers)
    assert set(project.places().values()) == {"unset unset"}


INI_FILES = {
    "pytest.ini": "[pytest]\ngpu_share = true\n",
    "tox.ini": "[pytest]\ngpu_share = true\n",
    "setup.cfg": "[tool:pytest]\ngpu_share = true\n",
    "pyproject.toml": "[tool.pytest.ini_options]\ngpu_share = true\n",
}
STRICTEST = ("--strict-config", "--strict-markers", "-W", "error")


def test_ini_file(project: Project, machine: Machine) -> None:
    """`gpu_share = true` in any configuration file, under the strictest of settings."""
    cases = {name: Case({name: text}, STRICTEST) for name, text in INI_FILES.items()}
    ended = run_all(cases, project.path, project.environment)
    assert {name: (it.code, it.err, it.said[0], len(it.places)) for name, it in ended.items()} == (
        dict.fromkeys(INI_FILES, (0, "", TWO, 2))
    )


def test_ini_file_with_workers(project: Project, machine: Machine) -> None:
    """The same in workers, where warnings are errors too."""
    project.file("pytest.ini", INI_FILES["pytest.ini"])
    result = project.pytest(*STRICTEST, beside=["unraisableexception"])
    assert (result.code, result.err, result.said[0], result.workers) == (0, "", TWO, 2)


@PYTEST_9
def test_native_toml(project: Project, machine: Machine) -> None:
    """pytest 9's own TOML tables, typed or quoted."""
    files = [
        ("pytest.toml", "[pytest]\ngpu_share = true\ngpu_share_safety_buffer_mb = 1024\n"),
        ("pytest.toml", '[pytest]\ngpu_share = "true"\ngpu_share_safety_buffer_mb = "1GB"\n'),
        (
            "pyproject.toml",
            "[tool.pytest]\ngpu_share = true\ngpu_share_max_workers_per_gb = 0.25\n",
        ),
        ("pyproject.toml", '[tool.pytest]\naddopts = ["-n", "gpu-auto"]\n'),
    ]
    strict = ("--strict-config", "-W", "error")
    cases = {text: Case({name: text}, strict) for name, text in files}
    ended = run_all(cases, project.path, project.environment)
    assert {text: (it.code, it.err, it.said[0], len(it.places)) for text, it in ended.items()} == (
        dict.fromkeys(cases, (0, "", TWO, 2))
    )


def test_json_alone_does_not_switch_on(project: Project, machine: Machine) -> None:
    """A file that lies about for another tool starts nothing."""
    project.file("performance_config.json", '{"gpu_resource_management": {"nonsense": 1}}')
    result = project.pytest()
    assert (result.code, result.said) == (0, [])


XDIST, OURS = "xdist.plugin", "pytest_gpushare.plugin"


BY_HAND = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def loaded(*plugins: str) -> list[str]:
    return [part for name in plugins for part in ("-p", name)]


@pytest.mark.parametrize("order", [(XDIST, OURS), (OURS, XDIST)])
def test_loaded_by_hand(order: tuple[str, str], project: Project, machine: Machine) -> None:
    """`-p` in both orders where plugins are not loaded automatically."""
    result = project.pytest(*loaded(*order), "-n", "gpu-auto", **BY_HAND)
    assert (result.code, result.err, result.said[0], result.workers) == (0, "", TWO, 2)


def test_asked_in_other_places(project: Project, machine: Machine) -> None:
    """In a variable, beside an ini file, and of a plugin that is loaded by hand or twice.

    A developer without a GPU overrules the ini file's `-n gpu-auto`.
    """
    auto = {"pytest.ini": "[pytest]\naddopts = -n gpu-auto\n"}
    ini = {"pytest.ini": INI_FILES["pytest.ini"]}
    two = ("--gpu-share", "-n", "2")
    cases = {
        "PYTEST_ADDOPTS": Case({}, (), {"PYTEST_ADDOPTS": "--gpu-share"}),
        "ini, refused": Case(ini, ("--no-gpu-share",)),
        "ini, typed": Case(ini, ("-n1",)),
        "gpu-auto, refused": Case(
            auto, ("--no-gpu-share",), {"PYTEST_XDIST_AUTO_NUM_WORKERS": "3"}
        ),
        "xdist first": Case({}, (*loaded(XDIST, OURS), *two), BY_HAND),
        "xdist last": Case({}, (*loaded(OURS, XDIST), *two), BY_HAND),
        "loaded twice": arguments("-p", OURS, "-n", "gpu-auto"),
    }
    ended = run_all(cases, project.path, project.environment)
    assert {
        name: (it.code, it.err, it.said[0] if it.said else None, len(it.places))
        for name, it in ended.items()
    } == {
        **dict.fromkeys(cases, (0, "", TWO, 2)),
        "ini, refused": (0, "", None, 0),
        "ini, typed": (0, "", ONE, 1),
        "gpu-auto, refused": (0, "", None, 3),
    }


@pytest.mark.parametrize(
    "arguments", [["-p", "no:xdist"], ["-p", OURS, "-p", "no:xdist.plugin", "-p", "no:xdist"]]
)
def test_without_xdist(arguments: list[str], project: Project, machine: Machine) -> None:
    """An explicit question that cannot be answered is an error, with the remedy."""
    result = project.pytest("--gpu-share", *arguments)
    assert (result.code, result.err.strip()) == (
        4,
        "ERROR: --gpu-share sizes the workers of pytest-xdist, which is not loaded: install "
        "pytest-xdist, or drop -p no:xdist",
    )


def test_gpu_auto_without_xdist(project: Project, machine: Machine) -> None:
    """Where `-n` itself is unknown, pytest's own error names what is missing."""
    result = project.pytest("-n", "gpu-auto", "-p", "no:xdist")
    assert result.code == 4
    assert "unrecognized arguments: -n" in result.err
    assert "pytest-gpushare: -n gpu-auto needs pytest-xdist" in result.err


def test_ini_without_xdist(project: Project, machine: Machine) -> None:
    """Switched on in the ini file, a run without xdist is one in this process."""
    project.file("pytest.ini", "[pytest]\ngpu_share = true\n")
    project.write(test_project=SHOW_PLACE.replace("i, worker_id", "i, worker_id='main'"))
    result = project.pytest("-p", "no:xdist")
    assert result.code == 0
    assert result.said[0].startswith("gpu-share: no workers: this process on GPU 0, 9.0 GB of VRAM")


def test_bad_number_of_workers(project: Project) -> None:
    """What xdist refuses stays refused, in the words that xdist's users know."""
    result = project.pytest("-n", "gpu-atuo")
    assert result.code == 4
    assert "argument -n/--numprocesses: invalid parse_numprocesses value: 'gpu-atuo'" in result.err


@pytest.mark.parametrize(
    "asking", [["-n", "gpu-auto"], ["--gpu-share", "-n", "0"], ["--gpu-share"]]
)
def test_nothing_is_probed(asking: list[str], project: Project, machine: Machine) -> None:
    """A command that runs no test asks neither NVML nor Ollama."""
    machine.inject("nvmlInitWithFlags", delay=5)
    options = ["--collect-only", "--help", "--version", "--markers", "--fixtures"]
    cases = {option: arguments(*asking, option) for option in options}
    ended = run_all(cases, project.path, project.environment)
    assert {option: (it.code, it.said, it.loaded) for option, it in ended.items()} == (
        dict.fromkeys(options, (0, [], []))
    )


@pytest.mark.parametrize("asking", [["-n", "0"], ["--pdb"], ["-n", "gpu-auto", "--pdb"]])
def test_in_process(asking: list[str], project: Project, machine: Machine) -> None:
    """Without workers the process itself is placed, before the first conftest is imported."""
    project.write(
        conftest="""
            import os
            SEEN = os.environ["CUDA_VISIBLE_DEVICES"], os.environ["PYTEST_GPUSHARE_ROLE"]

            def pytest_terminal_summary(terminalreporter):
                terminalreporter.write_line(f"conftest saw {SEEN}")
        """
    )
    result = project.pytest("--gpu-share", *asking)
    uuid = machine.snapshot()[0].uuid
    assert (result.code, result.workers, result.passed) == (0, None, 4)
    assert result.said[0] == (
        "gpu-share: no workers: this process on GPU 0, 9.0 GB of VRAM (preset conservative)"
    )
    assert f"conftest saw ('{uuid}', 'gpu')" in result.out


def test_in_process_leaves_nothing_behind(project: Project, machine: Machine) -> None:
    """pytest.main in somebody's program gives the environment back as it was."""
    project.file(
        "main.py",
        """
        import os, pytest
        before = dict(os.environ)
        assert pytest.main(["-q", "--gpu-share", "-n0", "-p", "no:cacheprovider"]) == 0
        after = dict(os.environ)
        changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
        print("changed:", sorted(changed))
        """,
    )
    result = project.command([sys.executable, "main.py"])
    assert "changed: []" in result.out or "changed: ['PYTEST_VERSION']" in result.out


def test_in_process_with_cuda_up(project: Project, machine: Machine) -> None:
    """A process that has a CUDA context already keeps the device that it has, and says so."""
    project.write(early="import gpusim\nheld = gpusim.alloc('1GB')\n", test_project=SHOW_PLACE)
    result = project.pytest("--gpu-share", "-n0", "-p", "early")
    assert result.code == 0
    assert result.said[0] == (
        "gpu-share: no workers: CUDA is up in this process already, so it keeps the GPU that it has"
    )
    assert set(project.places().values()) == {"unset unset"}


def test_dist_each_is_warned_of(project: Project, machine: Machine) -> None:
    """`--dist=each` multiplies the tests; it runs, but not unsaid."""
    result = project.pytest("--gpu-share", "--dist=each")
    assert (result.code, result.passed) == (0, 8)
    assert result.said[1] == (
        "  --dist=each: every test runs on each of the 2 workers: use --dist=load to share them out"
    )


def test_tx_alone_keeps_its_workers(project: Project, machine: Machine) -> None:
    """Workers that the user listed are all started; as many as fit get a GPU, the rest none."""
    project.write(test_project=SHOW_PLACE)
    result = project.pytest("--gpu-share", "--dist=load", "--tx=3*popen")
    assert (result.code, result.workers) == (0, 3)
    assert result.said[0] == (
        "gpu-share: 2 GPU workers × 4.5 GB = 9.0 GB, 1 CPU worker "
        "(limited by max_workers_per_gb; preset conservative)"
    )
    uuid = machine.snapshot()[0].uuid
    assert sorted(project.places().values()) == ["cpu ", f"gpu {uuid}", f"gpu {uuid}"]


def test_tx_with_devices_of_its_own(project: Project, machine: Machine) -> None:
    """A worker to which the user gave a device keeps it, and takes no slot."""
    project.write(test_project=SHOW_PLACE)
    own = "popen//env:CUDA_VISIBLE_DEVICES=7"
    result = project.pytest("--gpu-share", "--dist=load", f"--tx={own}", "--tx=2*popen")
    assert (result.code, result.workers) == (0, 3)
    uuid = machine.snapshot()[0].uuid
    assert sorted(project.places().values()) == [f"gpu {uuid}", f"gpu {uuid}", "unset 7"]
    one = project.pytest("--gpu-share", "--dist=load", f"--tx={own}", "--tx=popen")
    assert one.said[0].startswith("gpu-share: 1 GPU worker × 9.0 GB = 9.0 GB (limited by -n 1")


def test_tx_without_dist(project: Project, machine: Machine) -> None:
    """`--tx` alone starts its workers under --gpu-share, as `-n` does."""
    project.write(test_project=SHOW_PLACE)
    result = project.pytest("--gpu-share", "--tx", "2*popen")
    assert (result.code, result.passed, result.workers) == (0, 8, 2), result.out
    assert result.said[0].startswith("gpu-share: 2 GPU workers × 4.5 GB = 9.0 GB")
    uuid = machine.snapshot()[0].uuid
    assert set(project.places().values()) == {f"gpu {uuid}"}


def test_tx_with_devices_alone(project: Project, machine: Machine) -> None:
    """Workers on this host with devices of the user's are not called workers of other hosts."""
    own = "2*chdir=.//popen//env:CUDA_VISIBLE_DEVICES=7"
    result = project.pytest("--gpu-share", "--tx", own, "--dist=load")
    assert (result.code, result.passed) == (0, 4), result.out
    assert result.said == [
        "gpu-share: the workers of --tx have devices of your own: no GPU is assigned to them"
    ]


SETS_VARIABLES = """
    import os
    import pytest

    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests():
        os.environ.update({variables!r})
"""


@pytest.mark.parametrize("arguments", [[], ["-n0"]])
def test_variables_that_a_plugin_sets(
    arguments: list[str],
    project: Project,
    machine_with: Callable[..., Machine],
    ollama_with: Callable[..., OllamaServer],
) -> None:
    """As pytest-env does from the ini file, before conftests are loaded: they count."""
    machine_with(Device(total="24GB", used="2GB"), Device(total="24GB", used="2GB"))
    server = ollama_with({"qwen2.5:14b": "10GB"}, load="qwen2.5:14b")
    variables = {"OLLAMA_HOST": server.host, "CUDA_VISIBLE_DEVICES": "1"}
    project.write(sets=SETS_VARIABLES.format(variables=variables))
    nowhere = f"127.0.0.1:{closed_port()}"
    result = project.pytest("-p", "sets", "--gpu-share", *arguments, OLLAMA_HOST=nowhere)
    assert (result.code, result.passed) == (0, 4), result.out
    assert f"at {server.host}: qwen2.5:14b" in result.out
    assert [line[:7] for line in result.said if line.startswith("  GPU ")] == ["  GPU 1"]


def test_conftest_that_changes_what_its_process_sees(
    project: Project, machine_with: Callable[..., Machine]
) -> None:
    """The plan goes by what was set before: a conftest means its own process."""
    machine_with(Device(total="24GB", used="2GB"), Device(total="24GB", used="2GB"))
    plain = project.pytest("--gpu-share", "-n1")
    assert plain.said[0].startswith("gpu-share: 1 GPU worker × 9.0 GB = 9.0 GB")
    for value in ("", "1", "GPU-none"):
        project.write(conftest=f"import os\nos.environ['CUDA_VISIBLE_DEVICES'] = {value!r}\n")
        changed = project.pytest("--gpu-share", "-n1")
        assert (changed.code, changed.passed, changed.workers) == (0, 4, 1), changed.out
        assert changed.said[:3] == plain.said[:3]


def test_conftest_that_names_the_server(
    project: Project, machine: Machine, ollama_with: Callable[..., OllamaServer]
) -> None:
    """The tests ask the server that a conftest names: so does the plan."""
    server = ollama_with({"qwen2.5:14b": "10GB"}, load="qwen2.5:14b")
    project.write(conftest=f"import os\nos.environ['OLLAMA_HOST'] = {server.host!r}\n")
    result = project.pytest("--gpu-share", "-n1", OLLAMA_HOST=f"127.0.0.1:{closed_port()}")
    assert f"at {server.host}: qwen2.5:14b" in result.out


def test_almost_gpu_auto(project: Project) -> None:
    """The nearest word is named."""
    words = ["gpu", "gpu_auto", "GPU-AUTO", "gpuauto"]
    ended = run_all({word: arguments("-n", word) for word in words}, project.path)
    for word, it in ended.items():
        assert it.code == 4
        assert f"'{word}' is not a number of workers: did you mean gpu-auto?" in it.err


def test_options_without_the_switch(project: Project) -> None:
    """One warning where they are typed; nothing where they stand in addopts."""
    lacking = {
        "--gpu-share-report=r.json": "--gpu-share-report has no effect",
        "--gpu-share-strict": "--gpu-share-strict has no effect",
        "--gpu-share-preset packed": "--gpu-share-preset has no effect",
        "--gpu-share-config=gone.json": "--gpu-share-config has no effect",
        "--gpu-share-wait=0": "--gpu-share-wait has no effect",
        "--gpu-share-strict --gpu-share-report=r.json": (
            "--gpu-share-report and --gpu-share-strict have no effect"
        ),
    }
    cases = {}
    for line in lacking:
        typed = line.split()
        cases[f"{line}: typed"] = arguments(*typed)
        cases[f"{line}: -W error"] = arguments(*typed, "-W", "error")
        cases[f"{line}: refused"] = arguments(*typed, "--no-gpu-share")
        cases[f"{line}: collected"] = arguments(*typed, "--collect-only", "-q")
        cases[f"{line}: addopts"] = Case({"pytest.ini": f"[pytest]\naddopts = {line}\n"}, ())
    ended = run_all(cases, project.path)
    for line, text in lacking.items():
        result = ended[f"{line}: typed"]
        assert (result.code, result.passed) == (0, 1)
        assert "1 warning" in result.out
        assert f"{text} without --gpu-share or -n gpu-auto" in result.out
        strict = ended[f"{line}: -W error"]
        assert strict.code == 4
        assert strict.err.startswith(f"ERROR: {text} without --gpu-share or -n gpu-auto")
        for silent in ("refused", "collected"):
            assert "effect" not in ended[f"{line}: {silent}"].out
        result = ended[f"{line}: addopts"]
        assert (result.code, result.passed, "effect" in result.out) == (0, 1, False)


def test_simulation_without_the_switch(project: Project) -> None:
    """A what-if is not a real run: it does not start. In addopts it waits for the switch."""
    result = project.pytest("--gpu-share-simulate=24GB")
    assert (result.code, result.passed) == (4, 0)
    assert result.err.strip() == (
        "ERROR: --gpu-share-simulate has no effect without --gpu-share or -n gpu-auto: "
        "add one of them"
    )
    project.file("pytest.ini", "[pytest]\naddopts = --gpu-share-simulate=24GB\n")
    assert project.pytest().passed == 4


NESTED = """
    import os, subprocess, sys
    pytest_plugins = ["pytester"]

    def test_outer(pytester, monkeypatch):
        test = '''
            import glob, json, os

            def test_inner():
                paths = glob.glob(os.environ["PYTEST_GPUSHARE_LEASES"] + "/s-*")
                records = [json.load(open(path)) for path in paths]
                leases = [share[:1] for r in records for share in r["devices"].values()]
                assert sum(lease > [0] for lease in leases) == 1, records
                print(os.environ["CUDA_VISIBLE_DEVICES"])
        '''
        pytester.makepyfile(test)
        inner = pytester.runpytest_subprocess("-p", "no:cacheprovider", *{arguments!r})
        inner.assert_outcomes(passed=1)
        inner.stdout.fnmatch_lines([{line!r}])
"""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-s"], "*GPU-*"),
        (["--gpu-share", "-n0", "-s"], "*gpu-share: no workers: this process on GPU 0, * of VRAM*"),
        (["-n", "gpu-auto"], "gpu-share: 1 GPU worker *"),
    ],
)
def test_nested_runs(arguments: list[str], line: str, project: Project, machine: Machine) -> None:
    """A pytest that a test starts inside a worker is a run of its own, on the worker's device,
    and in the worker's lease."""
    project.write(test_project=NESTED.format(arguments=arguments, line=line))
    result = project.pytest("--gpu-share")
    assert (result.code, result.passed) == (0, 1), result.out


COVERED = "def double(x):\n    return 2 * x\n"


@pytest.mark.parametrize("asking", [["--gpu-share"], ["-n", "gpu-auto"], ["ini"], ["-n0"]])
def test_with_pytest_cov(asking: list[str], project: Project, machine: Machine) -> None:
    """pytest-cov decides before any number is known whether there are workers to measure in."""
    pytest.importorskip("pytest_cov", reason="pytest-cov is not installed here")
    project.file("covered.py", COVERED)
    project.write(test_project="import covered\ndef test_double(): assert covered.double(2) == 4\n")
    if asking == ["ini"]:
        project.file("pytest.ini", "[pytest]\ngpu_share = true\n")
    arguments = {"ini": [], "-n0": ["--gpu-share", "-n0"]}.get(asking[0], asking)
    result = project.pytest(*arguments, "--cov=covered", beside=["pytest_cov"])
    assert (result.code, result.passed) == (0, 1), result.out + result.err
    assert re.search(r"covered\.py +2 +0 +100%", result.out)


def test_loaded_too_late(project: Project, machine: Machine) -> None:
    """From a conftest the plugin comes too late to place the process itself, and says so."""
    project.write(conftest="pytest_plugins = ['pytest_gpushare.plugin']\n", test_project=SHOW_PLACE)
    result = project.pytest(
        *("-p", "xdist.plugin", "-n0", "-o", "gpu_share=true"),
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )
    assert result.code == 0, result.out + result.err
    assert result.said[0] == (
        "gpu-share: no workers: the plugin was loaded too late to place this process: load it "
        "with -p, so it keeps the GPU that it has"
    )


@pytest.mark.parametrize("workers", [["-n", "3"], ["-d", "--tx", "2*popen"]])
@pytest.mark.parametrize("asking", [["--gpu-share"], ["-o", "gpu_share=true"]])
def test_debugger_beside_workers(
    asking: list[str], workers: list[str], project: Project, machine: Machine
) -> None:
    """`--pdb` with workers is xdist's usage error, also where a conftest loads the plugin."""
    late = asking != ["--gpu-share"]
    if late:
        project.write(conftest="pytest_plugins = ['pytest_gpushare.plugin']\n")
        asking = ["-p", "xdist.plugin", *asking]
    variables = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} if late else {}
    result = project.pytest(*asking, "--pdb", *workers, **variables)
    assert (result.code, result.passed) == (4, 0)
    assert "--pdb is incompatible with distributing tests" in result.err


def test_no_header(project: Project, machine: Machine) -> None:
    """A fall-back is told also where pytest prints no header."""
    result = project.pytest(
        "--gpu-share", "-n1", "--no-header", "-o", "gpu_share_min_vram_per_worker_gb=20"
    )
    assert (result.code, result.passed) == (0, 4)
    assert result.said == [
        "gpu-share: 1 CPU worker (insufficient VRAM per worker: 9.0 GB usable, 20.0 GB needed; "
        "gpu_share_min_vram_per_worker_gb)"
    ]


def test_help_without_xdist(project: Project, machine: Machine) -> None:
    """Help is given also to whom the plugin would refuse a run."""
    assert project.pytest("--gpu-share", "-p", "no:xdist", "--help").code == 0


def test_in_process_at_v(project: Project, machine: Machine) -> None:
    """-v tells the place of the process itself."""
    uuid = machine.snapshot()[0].uuid
    result = project.pytest("--gpu-share", "-n0", "-v")
    assert f"  this process: GPU 0 ({uuid}), VRAM 9.0 GB" in result.said


def test_other_hosts_with_an_old_xdist(project: Project) -> None:
    """Workers on other hosts run through gateways, which xdist takes since 3.7."""
    if XDIST_HAS_PX:
        pytest.skip("this xdist is new enough")
    result = project.pytest("--tx", "gpu-auto*ssh=somewhere")
    assert (result.code, result.err.strip()) == (
        4,
        "ERROR: workers on other hosts need pytest-xdist 3.7 or newer: upgrade it",
    )

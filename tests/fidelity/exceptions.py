"""Where a run under the own scheduler may differ from stock xdist: the only such list.

Each entry has the reason for which no difference is reported.
"""

from __future__ import annotations

EXCEPTIONS = {
    "header": "The plugin's own lines of output, and pytest's lines about platform and plugins.",
    "frames of wrappers": (
        "An error in the code of pytest, or of a doctest's set-up, is shown with the frames of "
        "pluggy, which has more of them for each of our wrappers, and names all plugins there."
    ),
    "times": "Times, process numbers and addresses differ between any two runs.",
    "traceback of the scheduler": (
        "A worker that ends with a test begun (`pytest.exit` in a test) makes stock xdist fail "
        "with an INTERNALERROR whose traceback names the test. The exit code and the test's name "
        "are kept, the traceback is not."
    ),
    "order after a crash": (
        "With `--dist` of another kind than load, what a dead worker leaves goes to the end of "
        "xdist's queue, in groups of which as many as had been sent; ours goes on where it was. "
        "With one worker and load the order is that of one of up to four stock runs: it depends on "
        "which tests lasted 0.1 s or more."
    ),
    "a scheduler of the project's own": (
        "Where tests have needs, ours takes its place and follows `--dist`: compared as beside two "
        "workers or more, with one, too."
    ),
    "what ends a run": (
        "Several things may end a run: a failure under `-x`, a worker that dies, `pytest.exit` in "
        "the teardown of a class, after which stock xdist stops with an assertion. Which test "
        "comes first, and whether a second one does before all is over, depends on the "
        "distribution. Such an end is no difference where stock ends so, too, with one worker and "
        "the tests that each worker of ours began. Where only the number of workers that ended "
        "differs, the exit code is one of stock's runs, and may come from failures of several: "
        "ours goes on with the file of a dead worker before it takes the next (see `order after a "
        "crash`), so that a second test that crashes may run before the failure that ends the run. "
        "Stock has two ends there, too, if the failure comes later (seed 9482 with slower tests)."
    ),
    "groups": (
        "With pytest 9.2, xdist 3.8 cannot write the group of a test into its node id, and keeps "
        "no groups together under --dist=loadgroup. The plugin reads the markers, and keeps them. "
        "So the order differs there, with one worker too: then stock runs the tests in ours."
    ),
    "worker's end": (
        "A worker that ends in the teardown of a module or class (`pytest.exit` there) is reported "
        "for its last test; which test that is, and whether a second worker ends so, too, depends "
        "on the distribution. One such report is asked for, and no more than stock has. A worker "
        "that dies after a test, as in a teardown of the whole run, is reported for the test that "
        "it had been sent next, though it never began: as many may be as in stock."
    ),
    "warnings after a crash": (
        "pytest hands on the warnings of a test when its protocol is over: a worker that dies in "
        "it keeps them back. In which test it dies depends on the distribution, so with crashes a "
        "warning passes if stock gives it where it is given what each worker began."
    ),
    "errors after a crash": (
        "How many wider teardowns fail depends on the distribution. After a crash there must be "
        "errors where stock has any, or as many as where stock is given what each worker began: a "
        "plugin may hide those that fall on tests of certain names."
    ),
    "last failed": (
        "`--lf`, `--ff` and `--nf` with two workers or more choose by what failed in the run "
        "before, where errors of wider teardowns fall on other tests: compared as a run that is "
        "cut short."
    ),
    "no reference": (
        "Stock that hangs, or that runs a test again which ours runs once, shows nothing: its "
        "loadscope, loadfile and loadgroup do so after a worker's end. Nothing may be lost or run "
        "twice in ours."
    ),
    "distribution": (
        "Beside two workers or more, which worker runs which test is the scheduler's decision; "
        "stock differs from itself, too. What depends on it: the test that bears the error of a "
        "wider teardown, and so whether an expected failure hides that error and the run passes; "
        "how many tests run before a run is cut short; the order of reports. "
        "Such a difference is none where stock, with one worker, makes the same reports of the "
        "same tests in the same order. With crashes, or where a run is cut short, this holds for "
        "the outcome of a test alone."
    ),
}

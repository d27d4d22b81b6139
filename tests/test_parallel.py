"""Commands side by side: what happens when one fails, or when somebody presses Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agevlm_mlx import parallel
from agevlm_mlx.errors import UserError

WAITS = """
import signal, sys, time, pathlib
def stop(*_):
    with open(sys.argv[1], "a") as file: file.write("saved\\n")
    sys.exit(0)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
pathlib.Path(sys.argv[1]).touch()
time.sleep(30)
"""


def task(folder: Path, name: str, code: str, *args: str) -> parallel.Task:
    return parallel.Task(name, [sys.executable, "-c", code, *args], folder / f"{name}.log")


def run(tasks: list[parallel.Task], **options) -> dict[str, float]:
    return parallel.run(tasks, status=lambda: "", poll=0.02, **options)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_commands_run_at_the_same_time_and_leave_logs(tmp_path):
    # Each waits for the file that the other one makes.
    code = (
        "import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\n"
        "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(.01)\nprint('done')"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    seconds = run([task(tmp_path, "one", code, a, b), task(tmp_path, "two", code, b, a)])
    assert set(seconds) == {"one", "two"}
    assert (tmp_path / "one.log").read_text() == (tmp_path / "two.log").read_text() == "done\n"


def test_a_command_can_be_stopped_where_this_process_ignores_interrupts(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = "import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\ntime.sleep(30)"
        process = parallel.begin(task(tmp_path, "one", code, str(tmp_path / "there")))
        wait_for(tmp_path / "there")
        parallel.stop([process])
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert "KeyboardInterrupt" in (tmp_path / "one.log").read_text()  # not killed


def test_or_one_after_the_other(tmp_path):
    code = "import sys, time; print(time.time()); time.sleep(.05); print(time.time())"
    run([task(tmp_path, "one", code), task(tmp_path, "two", code)], together=False)
    one, two = ((tmp_path / f"{n}.log").read_text().split() for n in ("one", "two"))
    assert float(one[1]) <= float(two[0])


def test_a_crash_stops_the_other_and_shows_its_last_lines(tmp_path, capsys):
    saved = tmp_path / "saved"
    crash = (
        "import pathlib, sys, time\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(.01)\n"
        "print('the reason'); sys.exit(3)"
    )
    tasks = [task(tmp_path, "good", WAITS, str(saved)), task(tmp_path, "bad", crash, str(saved))]
    with pytest.raises(UserError, match=r"bad failed \(exit 3\).*bad\.log"):
        run(tasks)
    assert "bad | the reason" in capsys.readouterr().err
    assert saved.read_text() == "saved\n"


def test_ctrl_c_reaches_a_command_once_and_waits_for_it(tmp_path):
    saved = tmp_path / "saved"

    def press() -> None:
        wait_for(saved)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run([task(tmp_path, "good", WAITS, str(saved))])
    thread.join()
    assert saved.read_text() == "saved\n"


def test_the_terminals_ctrl_c_does_not_reach_a_command_twice(tmp_path):
    run([task(tmp_path, "one", "import os; print(os.getsid(0))")])
    assert int((tmp_path / "one.log").read_text()) != os.getsid(0)


def test_a_command_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "GRACE", 0.2)
    ready = tmp_path / "ready"
    deaf = (
        "import os, pathlib, signal, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
    )
    crash = (
        "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(.01)\n"
        "time.sleep(.1); sys.exit(1)"
    )
    tasks = [task(tmp_path, "deaf", deaf, str(ready)), task(tmp_path, "bad", crash, str(ready))]
    with pytest.raises(UserError):
        run(tasks)
    with pytest.raises(ProcessLookupError):
        os.kill(int(ready.read_text()), 0)


def test_termination_is_an_interrupt():
    def be_terminated() -> None:
        with parallel.terminate_as_interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        be_terminated()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_progress_is_one_line_at_a_time_when_not_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parallel, "QUIET_SECONDS", 0.0)
    tasks = [task(tmp_path, "one", "import time; time.sleep(.3)")]
    parallel.run(tasks, status=lambda: "step 1 of 2", poll=0.02)
    assert capsys.readouterr().out == "  step 1 of 2\n"


def test_a_command_that_cannot_start_leaves_nothing_running(tmp_path, monkeypatch):
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def spy(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", spy)
    missing = parallel.Task("none", [str(tmp_path / "no-such-program")], tmp_path / "none.log")
    with pytest.raises(FileNotFoundError):
        run([task(tmp_path, "good", WAITS, str(tmp_path / "saved")), missing])
    assert [process.poll() is not None for process in started] == [True]

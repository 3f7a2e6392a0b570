import copy
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dmpo_lightning.workers import CallError, TimeLimitError, WorkerDiedError, WorkerPool
from worker_functions import Refusing, behave

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def pool():
    made = WorkerPool(behave, workers=2, time_limit=30)
    yield made
    made.close()


def lives(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def ends(pid: int) -> bool:
    """Whether a process ends within seconds."""
    deadline = time.monotonic() + 20
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not lives(pid)


def test_results_come_in_the_order_of_the_calls(pool):
    calls = [("sleep", 0.5), *(("return", number) for number in range(20))]
    assert pool.map(calls) == ["slept", *range(20)]


def test_no_calls_start_no_worker(pool):
    assert pool.map([]) == []
    assert [worker.process for worker in pool._workers] == [None, None]


def test_a_raised_error_is_told_and_costs_no_worker(pool):
    before, error, after = pool.map([("pid",), ("raise", "x"), ("pid",)])
    assert isinstance(error, CallError)
    assert str(error) == "KeyError: 'x'"
    assert len({before, after, *pool.map([("pid",)] * 10)}) <= 2


@pytest.mark.parametrize("call", [("sleep", 600), ("long integer operation",)], ids=lambda call: call[0])
def test_a_call_over_the_time_limit_is_killed_and_its_worker_replaced(call):
    pool = WorkerPool(behave, workers=1, time_limit=1)
    (first,) = pool.map([("pid",)])
    late, second = pool.map([call, ("pid",)])
    assert isinstance(late, TimeLimitError)
    assert second != first
    assert not lives(first)
    pool.close()


def test_a_worker_that_exits_fails_its_own_call_only(pool):
    results = pool.map([("return", 1), ("exit", 7), ("return", 2), ("return", 3)])
    assert isinstance(results[1], WorkerDiedError)
    assert str(results[1]) == "the worker process ended with exit code 7"
    assert [results[0], *results[2:]] == [1, 2, 3]


def test_a_worker_killed_while_idle_is_replaced():
    pool = WorkerPool(behave, workers=1)
    (pid,) = pool.map([("pid",)])
    os.kill(pid, signal.SIGKILL)
    assert pool.map([("return", number) for number in range(4)]) == [0, 1, 2, 3]
    pool.close()


@pytest.mark.parametrize("length", [pytest.param(each, marks=pytest.mark.slow) for each in (1_000_000, 1)])
def test_a_thread_that_holds_everything_up_before_a_call_begins_costs_no_other_call(length):
    """It holds the lock of the interpreter, so that the worker hears nothing more, or only a part of a long text."""
    pool = WorkerPool(behave, workers=1, time_limit=2)
    assert pool.map([("leave a thread",)]) == ["left"]
    time.sleep(0.5)
    assert pool.map([("return", "2" * length), ("return", 3)]) == ["2" * length, 3]
    pool.close()


@pytest.mark.parametrize(
    ("guilty", "innocent", "value", "named"),
    [
        ("leave a thread", ("sleep", 0.5), "slept", "hold_the_interpreter)'] of the call with ('leave a thread',)"),
        ("leave a lock", ("take the lock",), "taken", "not known"),
    ],
)
def test_a_call_that_an_earlier_one_makes_late_is_made_anew_and_the_earlier_one_named(
    guilty, innocent, value, named, caplog
):
    pool = WorkerPool(behave, workers=1, time_limit=1)
    assert pool.map([(guilty,), innocent, ("return", 3)]) == ["left", value, 3]
    assert named in caplog.text
    pool.close()


def test_an_alarm_that_a_call_has_left_does_not_ring_and_a_fork_answers_once(pool):
    pool = WorkerPool(behave, workers=1)
    assert pool.map([("leave an alarm",), ("sleep", 0.4), ("fork", 1), *(("return", each) for each in range(9))]) == [
        *("left", "slept", 1),
        *range(9),
    ]
    pool.close()


@pytest.mark.slow
def test_a_call_that_stops_the_clock_of_the_worker_is_late_all_the_same():
    pool = WorkerPool(behave, workers=1, time_limit=1)
    late, after = pool.map([("stop the clock",), ("return", 2)])
    assert isinstance(late, TimeLimitError)
    assert after == 2
    pool.close()


def test_after_an_interrupt_no_worker_starts_any_more(pool):
    (worker, _) = pool._workers
    worker.is_stopped = True
    with pytest.raises(RuntimeError, match="ended before its first call"):
        worker.call(("return", 1))
    assert worker.process is None
    assert pool.map([("return", 1), ("return", 2)]) == [1, 2]


def test_a_value_that_cannot_be_pickled_is_an_error(pool):
    (error,) = pool.map([("a function",)])
    assert isinstance(error, CallError)
    assert "pickle" in str(error)


def test_a_pool_serves_several_threads_off_the_main_one(pool):
    results: dict[int, list] = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: pool.map([("return", n)] * 3)})) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [number] * 3 for number in range(4)}


def test_workers_import_no_torch(pool):
    assert pool.map([("modules", ["torch", "lightning", "numpy"])]) == [[]]


def test_a_worker_may_have_workers(pool):
    assert pool.map([("nested", 3)]) == [[3]]


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))], ids=["copy", "pickle"]
)
def test_a_copy_starts_workers_of_its_own(pool, again):
    (pid,) = set(pool.map([("pid",)]))
    other = again(pool)
    assert [worker.process for worker in other._workers] == [None, None]
    assert (other.workers, other.time_limit) == (2, 30)
    assert pid not in other.map([("pid",)])
    other.close()


def test_workers_end_with_their_pool():
    pool = WorkerPool(behave, workers=1)
    (pid,) = pool.map([("pid",)])
    del pool
    gc.collect()
    assert ends(pid)


PARENT = """
import sys
from worker_functions import behave
from dmpo_lightning.workers import WorkerPool
if __name__ == "__main__":
    pool = WorkerPool(behave, workers=1)
    {}
"""


def script(folder, code):
    file = folder / "parent.py"
    file.write_text(PARENT.format(code))
    path = os.pathsep.join(sys.path)
    return subprocess.Popen([sys.executable, str(file)], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE)


def test_workers_end_with_the_interpreter(tmp_path):
    with script(tmp_path, "print(*pool.map([('pid',)]), flush=True)") as parent:
        output, _ = parent.communicate(timeout=60)
    assert parent.returncode == 0
    assert ends(int(output))


def test_a_busy_worker_ends_when_its_parent_is_killed(tmp_path):
    pids = tmp_path / "pids"
    with script(tmp_path, f"pool.map([('start and wait', {str(pids)!r})])") as parent:
        while not (pids.exists() and pids.read_text()):
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
        worker, child = map(int, pids.read_text().split())
        assert ends(worker)
    os.kill(child, signal.SIGKILL)


def test_what_a_killed_call_has_started_is_killed_too(tmp_path):
    pool = WorkerPool(behave, workers=1, time_limit=2)
    (late,) = pool.map([("start and wait", str(tmp_path / "pids"))])
    assert isinstance(late, TimeLimitError)
    assert all(ends(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    pool.close()


def test_a_script_without_a_guard_is_an_error_that_says_so(tmp_path):
    file = tmp_path / "unguarded.py"
    file.write_text("from worker_functions import *\nprint(WorkerPool(behave, workers=1).map([('return', 1)]))")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'needs `if __name__ == "__main__":`' in done.stderr


def test_a_function_that_cannot_be_made_in_the_worker_is_an_error():
    with pytest.raises(RuntimeError, match="could not start: OSError: no model here"):
        WorkerPool(Refusing(), workers=1).map([()])


@pytest.mark.parametrize("time_limit", [None, 60])
def test_a_worker_that_ends_and_leaves_a_child_fails_its_own_call_only(time_limit):
    pool = WorkerPool(behave, workers=1, time_limit=time_limit)
    left, after = pool.map([("leave a child",), ("return", 2)])
    assert isinstance(left, WorkerDiedError)
    assert str(left) == "the worker process ended with exit code 3"
    assert after == 2
    pool.close()


def test_a_worker_that_closes_its_pipe_fails_its_own_call_only(pool):
    closed, after = pool.map([("close all files",), ("return", 2)])
    assert isinstance(closed, WorkerDiedError)
    assert after == 2


def test_an_exit_by_an_exception_is_told_and_costs_no_worker():
    pool = WorkerPool(behave, workers=1)
    before, exited, closed, interrupted, unspeakable, after = pool.map(
        [("pid",), ("sys.exit", 7), ("GeneratorExit",), ("KeyboardInterrupt",), ("unspeakable",), ("pid",)]
    )
    assert [str(error) for error in (exited, closed, interrupted, unspeakable)] == [
        "SystemExit: 7",
        "GeneratorExit: ",
        "KeyboardInterrupt: ",
        "Unspeakable",
    ]
    assert before == after
    pool.close()


def test_an_interrupt_of_the_parent_ends_the_calls_under_way(tmp_path):
    with script(tmp_path, f"pool.map([('start and wait', {str(tmp_path / 'pids')!r})])") as parent:
        while not ((tmp_path / "pids").exists() and (tmp_path / "pids").read_text()):
            assert parent.poll() is None
            time.sleep(0.05)
        parent.send_signal(signal.SIGINT)
        parent.communicate(timeout=90)
    assert parent.returncode not in (0, None)
    assert all(ends(int(pid)) for pid in (tmp_path / "pids").read_text().split())


@pytest.fixture
def slow_module(tmp_path, monkeypatch):
    """The name of a module that takes two seconds to import."""
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(2)\n\n\ndef value():\n    return 5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "slow_module"


def test_the_module_of_a_function_is_imported_before_its_first_call_and_in_it_an_import_counts(slow_module):
    pool = WorkerPool(importlib.import_module(slow_module).value, workers=1, time_limit=1)
    assert pool.map([()]) == [5]
    pool.close()
    pool = WorkerPool(behave, workers=1, time_limit=1)
    (late,) = pool.map([("import", slow_module)])
    assert isinstance(late, TimeLimitError)
    pool.close()


@pytest.mark.parametrize(("workers", "time_limit"), [(0, None), (1, 0), (1, -1), (1, float("nan"))])
def test_settings_that_make_no_sense_are_refused(workers, time_limit):
    with pytest.raises(ValueError, match=r"`workers` must be|`time_limit` must be"):
        WorkerPool(behave, workers=workers, time_limit=time_limit)

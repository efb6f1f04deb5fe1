"""The CPU's threads are shared among living processes, and work that was begun keeps its number."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from hpo.machine import registry, threads
from hpo.machine.doctor import Evidence, judge
from hpo.machine.threads import allowed_cores, part, share_threads
from trainer.errors import MachineError

WORK = """
import sys
from hpo.machine import registry
print(registry.enter(), flush=True)
sys.stdin.read()
"""


@contextmanager
def worker() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", WORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline().strip().isdecimal()
        yield process
        process.kill()


@pytest.fixture
def cores(machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with eight cores, and no variable that limits threads."""
    before = torch.get_num_threads()
    for name in threads.LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "allowed_cores", lambda: 8)
    threads._set.clear()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)
    threads._set.clear()


def test_each_takes_its_part_and_gets_it_back_when_others_end(cores) -> None:
    assert share_threads() == 8
    with ExitStack() as stack:
        others = [stack.enter_context(worker()) for _ in range(3)]
        assert share_threads() == torch.get_num_threads() == 2
        for process in others:
            process.kill()  # without a chance to say goodbye
            process.wait()
        assert share_threads() == torch.get_num_threads() == 8
    place = registry.folder()
    assert place is not None and len(list(place.glob("worker-*.lock"))) == 1  # those of the dead are removed


def test_what_was_begun_goes_on_with_its_number(cores) -> None:
    with worker():
        assert share_threads(begun_with=3) == torch.get_num_threads() == 3
        assert share_threads() == 4


def test_the_users_word_counts(cores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    torch.set_num_threads(5)
    with worker():
        assert share_threads() == share_threads(begun_with=2) == torch.get_num_threads() == 5
        assert registry.enter() == 2  # others count this process all the same


def test_a_library_that_set_the_number_itself_is_not_overruled(cores) -> None:
    assert share_threads() == 8
    torch.set_num_threads(2)
    assert share_threads() == 2
    with worker():
        assert share_threads() == 1


def test_without_a_folder_for_locks_nothing_fails(cores, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv(registry.FOLDER, raising=False)
    monkeypatch.setattr(registry, "_made", lambda *_: (tmp_path, "it belongs to another user"))
    assert registry.folder() is None
    assert share_threads() == 8 and registry.take_gpu("a") and registry.user_of_gpu("a") == ""


@pytest.mark.parametrize(("name", "why"), [("file", "File exists"), ("file/below", "Not a directory")])
def test_a_folder_for_locks_that_was_set_by_hand_must_be_usable(
    cores, monkeypatch: pytest.MonkeyPatch, tmp_path, name: str, why: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(registry.FOLDER, str(tmp_path / name))
    for call in (share_threads, lambda: registry.take_gpu("a")):
        with pytest.raises(MachineError, match=why) as caught:
            call()
        assert registry.FOLDER in caught.value.hint
    finding = next(one for one in judge(Evidence()).findings if one.name == "locks")
    assert why in finding.found and "unset it" in finding.todo


def test_parts() -> None:
    assert [part(8, n) for n in (0, 1, 2, 3, 4, 9)] == [8, 8, 4, 2, 2, 1]


@pytest.mark.parametrize(
    ("name", "text", "cores"),
    [("cpu.max", "max 100000", None), ("cpu.max", "150000 100000", 1), ("cpu.max", "nonsense", None)],
)
def test_the_limit_of_a_container(system, name: str, text: str, cores: int | None) -> None:
    root = system(f"sys/fs/cgroup/{name}", text)
    free = allowed_cores(root / "nothing")
    assert allowed_cores(root) == (free if cores is None else min(free, cores))


def test_the_limit_of_a_container_in_the_first_form_of_cgroups(system) -> None:
    root = system("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "100000")
    system("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert allowed_cores(root) == 1
    system("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
    assert allowed_cores(root) == allowed_cores(root / "nothing")

"""How many workers a search starts, and where: every free GPU by itself, never more than there is room for."""

from __future__ import annotations

import os

import pytest

from hpo.machine import ASSIGNED, WORKERS, registry, threads
from hpo.machine.crew import worker_devices
from hpo.machine.device import own_device
from tests.unit.hpo.machine.test_own_device import OLD, RTX, other_process
from trainer.errors import ConfigError, MachineError, NoDevice


def opened(machine) -> list[tuple[str, object]]:
    return [call for call in machine.calls if call[0] != "properties"]


def test_without_an_option_every_free_gpu_gets_a_worker_and_none_is_touched(machine) -> None:
    machine.cards(RTX, RTX, RTX)
    assert worker_devices(None, None, machine.say) == ("cuda:0", "cuda:1", "cuda:2")
    assert machine.lines == [] and opened(machine) == [] and registry._OWN == {}


def test_one_gpu_none_or_a_device_that_was_named_is_a_single_process(machine) -> None:
    assert worker_devices(None, None, machine.say) == ()
    machine.cards(RTX)
    assert worker_devices(None, None, machine.say) == ()
    machine.cards(RTX, RTX)
    for given in ("cuda:1", "cuda", "cpu"):
        assert worker_devices(None, given, machine.say) == ()
    assert worker_devices(1, None, machine.say) == ()
    assert worker_devices(None, None, machine.say, most=1) == ()  # one trial is left
    machine.broken("CUDA unknown error")
    assert worker_devices(None, None, machine.say) == ()  # what loads next says why
    assert machine.lines == []


def test_gpus_in_use_or_without_kernels_are_left_out_and_said(machine) -> None:
    machine.cards(RTX, OLD, RTX, RTX)
    with other_process("uuid-2") as pid:
        assert worker_devices(None, None, machine.say) == ("cuda:0", "cuda:3")
        assert machine.lines == [f"cuda:2 is left out: it is in use by process {pid}"]
        machine.lines.clear()
        with other_process("uuid-3"):
            assert worker_devices(None, None, machine.say) == ()  # one is free: a single process finds it
            assert machine.lines == []


def test_a_gpu_that_other_programs_fill_is_left_out(machine) -> None:
    machine.cards(RTX, RTX, RTX)
    machine.smi("".join(
        f"echo '{n}, GPU-uuid-{n}, RTX, 580.1, 16000, {used}, 8.9'\n" for n, used in enumerate((300, 15000, 300))
    ))  # fmt: skip
    assert worker_devices(None, None, machine.say) == ("cuda:0", "cuda:2")
    assert machine.lines == ["cuda:1 is left out: other programs use much of its memory"]
    assert worker_devices(2, None, machine.say) == ("cuda:0", "cuda:2")
    assert worker_devices(3, None, machine.say) == ("cuda:0", "cuda:1", "cuda:2")  # asked for


def test_there_are_no_more_workers_than_trials(machine) -> None:
    machine.cards(RTX, RTX, RTX)
    assert worker_devices(None, None, machine.say, most=2) == ("cuda:0", "cuda:1")
    assert worker_devices(3, None, machine.say, most=2) == ("cuda:0", "cuda:1", "cuda:2")


def test_more_workers_than_gpus_are_refused_with_what_to_do(machine) -> None:
    machine.cards(RTX, RTX)
    assert worker_devices(2, "cuda", machine.say) == ("cuda:0", "cuda:1")
    with pytest.raises(
        ConfigError, match="--workers 3: a worker needs a GPU of its own, and 2 are usable"
    ) as refused:
        worker_devices(3, None, machine.say)
    assert "--workers 2 or less" in refused.value.hint and "--device cpu" in refused.value.hint
    with pytest.raises(ConfigError, match="cuda:1 is one GPU"):
        worker_devices(2, "cuda:1", machine.say)
    with other_process("uuid-0") as pid:
        with pytest.raises(
            MachineError, match=rf"only 1 of 2 GPUs are free \(in use: cuda:0 by process {pid}"
        ) as no:
            worker_devices(2, None, machine.say)
        assert "--workers 1" in no.value.hint
    machine.cards(OLD)
    with pytest.raises(MachineError, match="no GPU can be used: GTX 1080 has compute capability"):
        worker_devices(2, None, machine.say)
    machine.broken("Found no NVIDIA driver on your system.")
    with pytest.raises(MachineError, match="no GPU can be used") as broken:
        worker_devices(2, None, machine.say)
    assert "--device cpu" in broken.value.hint


def test_on_a_cpu_there_are_at_most_as_many_workers_as_cores(
    machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    for given in ("cpu", None):
        assert worker_devices(4, given, machine.say) == ("cpu",) * 4
        with pytest.raises(ConfigError, match="--workers 5: this machine has 4 CPU cores") as refused:
            worker_devices(5, given, machine.say)
        assert refused.value.hint == "give --workers 4 or less"


def test_a_worker_takes_the_gpu_that_it_was_given_and_never_shares_it(machine) -> None:
    machine.cards(RTX, RTX)
    token = ASSIGNED.set("cuda:1")
    try:
        with other_process("uuid-1"), pytest.raises(NoDevice, match="cuda:1 is in use by process"):
            own_device(None, base="sd15", say=machine.say)
        assert own_device(None, base="sd15", say=machine.say) == "cuda:1"
        assert own_device("cuda", base="sd15", say=machine.say) == "cuda:1"  # again, in its confirmation
        assert opened(machine)[:2] == [("set_device", 1), ("zeros", "cuda:1")]
        assert machine.lines == []
        machine.broken("CUDA unknown error - this may be due to an incorrectly set up environment")
        with pytest.raises(NoDevice, match="cuda:1 cannot be used"):
            own_device(None, base="sd15", say=machine.say)
    finally:
        ASSIGNED.reset(token)


def test_each_of_n_workers_has_its_part_of_the_cores_before_the_others_have_started(
    machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    for name in threads.LIMITS:
        monkeypatch.delenv(name, raising=False)
    now = torch.get_num_threads()
    monkeypatch.setattr(threads, "_set", [now])
    monkeypatch.setattr(threads, "_alone", [8])
    token = WORKERS.set(4)
    try:
        assert threads.share_threads() == 2
        WORKERS.reset(token)
        assert threads.share_threads() == 8
    finally:
        torch.set_num_threads(now)

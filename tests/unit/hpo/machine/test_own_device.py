"""The device of a process: never the CPU without a word, never another process's GPU, never GPU 0 by the way."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hpo.machine import nvidia, registry
from hpo.machine.device import check_device, own_device
from trainer.errors import ConfigError, MachineError

RTX, OLD, TURING = ("NVIDIA GeForce RTX 4080", (8, 9)), ("GTX 1080", (6, 1)), ("RTX 2080", (7, 5))
HOLD = """
import sys
from hpo.machine import registry
print(registry.take_gpu(sys.argv[1]), flush=True)
sys.stdin.read()
"""


@contextmanager
def other_process(uuid: str) -> Iterator[int]:
    """A living process that has a GPU."""
    words = [sys.executable, "-c", HOLD, uuid]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "True\n"
        yield process.pid
        process.stdin.close()


def test_without_any_card_a_miniature_runs_on_the_cpu_without_a_word(machine) -> None:
    assert own_device(None, base="mini-sd15", say=machine.say) == "cpu"
    assert machine.lines == []


def test_a_real_base_on_a_cpu_is_said_to_take_hours_unless_it_was_asked_for(machine) -> None:
    for given in ("cpu", None):
        assert own_device(given, base="sd15", say=machine.say) == "cpu"
    assert len(machine.lines) == 1 and "hours to days" in machine.lines[0]


@pytest.mark.parametrize(
    ("reason", "what", "todo"),
    [
        (
            "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver",
            "too old",
            "update the driver to",
        ),
        ("CUDA driver version is insufficient for CUDA runtime version", "too old", "update the driver"),
        ("Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted on "
         "non supported HW", "compatibility library", "LD_LIBRARY_PATH"),
        ("Error 803: system has unsupported display driver / cuda driver combination", "older one", "restart"),
        ("CUDA unknown error - this may be due to an incorrectly set up environment", "unknown", "nvidia_uvm"),
        ("Found no NVIDIA driver on your system.", "not loaded", "--gpus all"),
        ("Torch not compiled with CUDA enabled", "for the CPU only", "pytorch.org"),
        ("No CUDA GPUs are available", "no card is visible", "--gpus all"),
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_used_is_never_replaced_by_the_cpu(machine, reason, what, todo) -> None:
    machine.broken(reason)
    with pytest.raises(MachineError) as caught:
        own_device(None, base="sd15", say=machine.say)
    assert what in caught.value.message and todo in caught.value.hint
    assert "--device cpu" in caught.value.hint
    assert own_device("cpu", base="mini-sd15", say=machine.say) == "cpu"
    assert own_device(None, base="mini-sd15", say=machine.say) == "cpu"  # seconds of work: said, not refused
    assert len(machine.lines) == 1 and what in machine.lines[0]


def test_a_driver_that_hangs_is_not_asked_by_this_process(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    machine.smi("exec sleep 60")
    machine.has_traces()
    monkeypatch.setattr("hpo.machine.nvidia.ask.__defaults__", (0.2,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("would hang"))
    with pytest.raises(MachineError, match="does not answer"):
        own_device(None, base="sd15")


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_hidden_on_purpose_is_a_choice(machine, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    machine.broken("No CUDA GPUs are available")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert own_device(None, base="mini-sd15", say=machine.say) == "cpu"
    assert machine.lines == ["CUDA_VISIBLE_DEVICES hides all GPUs: the CPU is used"]


def test_a_wheel_without_kernels_for_the_card_is_refused_before_any_work(machine) -> None:
    machine.cards(OLD)
    with pytest.raises(MachineError, match=r"GTX 1080 has compute capability 6\.1.*7\.5 to 12\.0") as caught:
        own_device(None, base="sd15", say=machine.say)
    assert "cu126" in caught.value.hint
    with pytest.raises(MachineError, match=r"cuda:\d cannot be used"):
        own_device("cuda:0", base="sd15", say=machine.say)


def test_the_first_card_with_kernels_is_taken(machine) -> None:
    machine.cards(OLD, RTX)
    assert own_device(None, base="sd15", say=machine.say) == "cuda:1"


def test_a_card_that_lacks_something_is_one_line(machine) -> None:
    machine.cards(TURING)
    assert own_device(None, base="sd15", say=machine.say) == "cuda:0"
    assert len(machine.lines) == 1
    assert "no bf16: fp16 is used" in machine.lines[0] and "flash" in machine.lines[0]
    machine.lines.clear()
    own_device(None, base="sd15", precision="bf16", say=machine.say)
    assert "auto uses fp16" in machine.lines[0]
    machine.lines.clear()
    own_device(None, base="sd15", precision="fp16", say=machine.say)
    assert "bf16" not in machine.lines[0] and "flash" in machine.lines[0]


def test_a_good_card_is_used_without_a_word(machine) -> None:
    machine.cards(RTX)
    assert own_device(None, base="sd15", say=machine.say) == "cuda:0"
    assert machine.lines == []


def test_cuda_1_never_touches_gpu_0(machine) -> None:
    machine.cards(RTX, RTX)
    assert own_device("cuda:1", base="sd15", say=machine.say) == "cuda:1"
    opened = [call for call in machine.calls if call[0] != "properties"]  # properties need no context
    assert opened == [("set_device", 1), ("zeros", "cuda:1")]  # the current device first


def test_processes_take_different_gpus(machine) -> None:
    machine.cards(RTX, RTX)
    with other_process("uuid-0") as pid:
        assert own_device(None, base="sd15", say=machine.say) == "cuda:1"
        assert f"in use: cuda:0 by process {pid}" in machine.lines[0]
        assert own_device("cuda", base="sd15", say=machine.say) == "cuda:1"  # the one that it has
    assert registry.user_of_gpu("uuid-0") == ""  # released with its process


def test_when_all_are_taken_nothing_is_shared_untold(machine) -> None:
    machine.cards(RTX)
    with other_process("uuid-0") as pid:
        with pytest.raises(MachineError, match=f"every GPU is in use: cuda:0 by process {pid}") as caught:
            own_device(None, base="sd15", say=machine.say)
        assert "--device cuda:0" in caught.value.hint
        assert own_device("cuda:0", base="sd15", say=machine.say) == "cuda:0"
        assert "shared with process" in machine.lines[-1]


def test_a_card_that_other_programs_fill_comes_last(machine) -> None:
    machine.cards(RTX, RTX)
    machine.smi(
        "echo '0, GPU-uuid-0, RTX, 580.1, 16000, 15000, 8.9'; echo '1, GPU-uuid-1, RTX, 580.1, 16000, 300, 8.9'"
    )
    assert own_device(None, base="sd15", say=machine.say) == "cuda:1"


def test_ranks_of_a_launcher_take_their_own_and_no_lock(machine) -> None:
    machine.cards(RTX, RTX)
    with other_process("uuid-1"):
        assert own_device(None, base="sd15", say=machine.say, local_rank=1, ranks=2) == "cuda:1"
        assert own_device("cuda", base="sd15", say=machine.say, local_rank=1, ranks=2) == "cuda:1"
    assert machine.lines == []


def test_more_ranks_than_gpus_is_said_as_that(machine) -> None:
    machine.cards(RTX)
    for given in (None, "cuda"):
        with pytest.raises(
            MachineError, match="process 2 of this machine has no GPU: 1 is visible"
        ) as caught:
            own_device(given, base="sd15", local_rank=1, ranks=2)
        assert "--nproc-per-node 1" in caught.value.hint


def test_a_container_that_only_shows_the_driver_of_its_host_uses_the_cpu(
    machine, system, monkeypatch
) -> None:
    root = system(".dockerenv", "")
    system("proc/driver/nvidia/version", "NVRM version: 580.65")
    seen = nvidia.traces
    monkeypatch.setattr(nvidia, "traces", lambda: seen(root, {}))
    assert own_device(None, base="sd15", say=machine.say) == "cpu"
    assert len(machine.lines) == 1 and "no GPU is used" in machine.lines[0]


def test_a_card_without_a_uuid_is_used_without_a_lock(machine) -> None:
    machine.cards(RTX, uuids=False)
    with other_process("uuid-0"):
        assert own_device(None, base="sd15", say=machine.say) == "cuda:0"
    assert registry._OWN == {} and machine.lines == []


def test_a_gpu_that_does_not_exist(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.cards(RTX, RTX)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for refuse in (lambda: own_device("cuda:2", base="sd15"), lambda: check_device("cuda:2")):
        with pytest.raises(MachineError, match=r"no such GPU \(CUDA_VISIBLE_DEVICES is 0,1\)") as caught:
            refuse()
        assert caught.value.hint == "give one of: cuda:0, cuda:1; or cpu"
    with pytest.raises(ConfigError, match="is not known"):
        own_device("gpu", base="sd15")


@pytest.mark.parametrize("given", [None, "cuda"])
def test_where_the_first_card_fails_the_next_is_taken(machine, monkeypatch, given) -> None:
    import torch

    machine.cards(RTX, RTX, RTX)

    def zeros(*_: object, device: str) -> None:
        if device != "cuda:2":
            raise torch.OutOfMemoryError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", zeros)
    assert own_device(given, base="sd15", say=machine.say) == "cuda:2"
    assert [line for line in machine.lines if "no memory left" in line and "next GPU is tried" in line] == [
        line for line in machine.lines if line.startswith("warning: ")
    ]
    assert len(machine.lines) == 5 and machine.lines[-1].startswith("using cuda:2")
    assert registry.has_gpu("uuid-2") and not registry.has_gpu("uuid-0")
    monkeypatch.setattr(torch, "zeros", lambda *_, device: zeros(device="cuda:0"))
    with pytest.raises(MachineError, match=r"cuda:\d cannot be used"):
        own_device(given, base="sd15", say=machine.say)


def test_a_dry_run_says_what_to_do_about_a_device_as_a_run_does(machine) -> None:
    machine.broken("CUDA driver version is insufficient for CUDA runtime version")
    told = []
    for refuse in (lambda: own_device("cuda", base="sd15"), lambda: check_device("cuda")):
        with pytest.raises(MachineError) as caught:
            refuse()
        told.append((caught.value.message, caught.value.hint))
    assert told[0] == told[1] and "update the driver" in told[0][1]


def test_a_card_without_room_gives_its_lock_back(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    machine.cards(RTX)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(MachineError, match="no memory left"):
        own_device(None, base="sd15")
    assert not registry.has_gpu("uuid-0")

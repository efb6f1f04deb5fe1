"""hpo doctor: every kind of machine is described, nothing crashes it, and it fits a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from hpo.cli.main import main
from hpo.machine import doctor, nvidia
from hpo.machine.doctor import NOTE, OK, PROBLEM, Evidence, Finding, Report, as_json, judge, lines

WHEEL = {"version": "2.15.0+cu132", "cuda": "13.2", "hip": None, "threads": 2}
BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
BNB = {"version": "0.50.2", "cuda": True, "reason": ""}
SMI = nvidia.Answer(
    (nvidia.Card(0, "GPU-u", "RTX 4080", "580.65", 16 << 30, 1 << 30, (8, 9)),), is_there=True
)
GOOD = {
    "index": 0, "name": "RTX 4080", "capability": [8, 9], "total_bytes": 16.9e9, "uuid": "u", "works": True,
    "free_bytes": 15e9, "reason": "",
}  # fmt: skip


def evidence(system: Callable[[str, str], Path], tmp_path: Path, **more) -> Evidence:
    root = system("proc/meminfo", "MemTotal: 32000000 kB\nMemAvailable: 30000000 kB\n")
    probe = {
        "wheel": WHEEL,
        "kernels": {"built": BUILT, "flash": True},
        "cuda": {"available": True, "reason": ""},
        "bitsandbytes begins": {},
        "bitsandbytes": BNB,
    } | more.pop("probe", {})
    values = {"root": root, "runs": tmp_path, "environment": {}, "probe": probe, "clock": "yes"} | more
    return Evidence(**values)


def named(report: Report, name: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.name == name]


def test_a_good_card_is_all_right(system, tmp_path: Path) -> None:
    report = judge(evidence(system, tmp_path, smi=SMI, cards=(GOOD,)))
    assert report.usable and report.device == "cuda:0"
    assert [f.name for f in report.findings if f.state == PROBLEM] == []
    words = " ".join(f.found for f in named(report, "cuda:0"))
    assert "compute capability 8.9" in words and "15.0 of 16.9 GB free" in words
    assert "bf16 yes, fp8 products yes, flash attention yes, TF32 yes" in words
    assert named(report, "verdict")[0] == Finding("verdict", "hpo uses cuda:0")


def test_what_an_older_card_lacks(system, tmp_path: Path) -> None:
    report = judge(evidence(system, tmp_path, smi=SMI, cards=({**GOOD, "capability": [7, 5]},)))
    abilities = named(report, "cuda:0")[1]
    assert "bf16 no" in abilities.found and "fp16 is used" in abilities.todo and abilities.state == NOTE
    assert report.usable


def test_a_wheel_without_kernels(system, tmp_path: Path) -> None:
    report = judge(evidence(system, tmp_path, smi=SMI, cards=({**GOOD, "capability": [6, 1]},)))
    assert not report.usable and report.device == "cpu"
    assert "kernels for 7.5 to 12.0" in named(report, "cuda:0")[0].found


def test_who_uses_the_memory(system, tmp_path: Path) -> None:
    users = (nvidia.User("GPU-u", 77, "/opt/comfy/python", 9_000_000_000),)
    report = judge(evidence(system, tmp_path, smi=SMI, users=users, cards=({**GOOD, "free_bytes": 4e9},)))
    memory = named(report, "cuda:0")[2]
    assert memory.state == NOTE and "4.0 of 16.9 GB free; used by python (77, 9.0 GB)" in memory.found


def test_an_old_driver(system, tmp_path: Path) -> None:
    reason = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)."
    report = judge(
        evidence(system, tmp_path, smi=SMI, probe={"cuda": {"available": False, "reason": reason}})
    )
    found = named(report, "CUDA")[0]
    assert found.state == PROBLEM and "too old" in found.found and "580 or newer" in found.todo
    assert not report.usable


def test_a_driver_on_which_the_probe_dies_or_hangs(system, tmp_path: Path) -> None:
    """W12 · weight 1 · The driver is dead or does not answer → `hpo doctor` says so in time and goes on with
    its other checks.
    """

    def ended(code: int | None, output: str) -> Report:
        parts, cards, failed = doctor._read_probe(code, output)
        more = {"probe": parts, "cards": cards, "probe_failed": failed}
        built = Evidence(**{**vars(evidence(system, tmp_path, smi=SMI)), **more})
        return judge(built)

    first = json.dumps({"part": "wheel", **WHEEL})
    for code, output in ((-6, first), (None, f"{first}\nno answer within 120 s"), (1, f"{first}\nTraceback")):
        report = ended(code, output)
        assert named(report, "CUDA")[0].state == PROBLEM and not report.usable
    assert "signal 6" in named(ended(-6, first), "CUDA")[0].found
    assert "does not start" in named(ended(-6, first), "CUDA")[0].found
    assert named(ended(1, "ImportError: libc10.so"), "PyTorch")[0].state == PROBLEM
    crashed = "\n".join([first, *(json.dumps({"part": part}) for part in ("cuda", "bitsandbytes begins"))])
    broken = json.dumps({"part": "cuda", "available": True, "reason": ""})
    crashed = "\n".join([first, broken, json.dumps({"part": "bitsandbytes begins"})])
    assert "importing it ended the process" in named(ended(-11, crashed), "bitsandbytes")[0].found


def test_nvidia_smi_in_a_container_without_a_gpu(system, tmp_path: Path) -> None:
    smi = nvidia.Answer(reason="NVIDIA-SMI has failed because it couldn't communicate", is_there=True)
    system(".dockerenv", "")
    report = judge(evidence(system, tmp_path, smi=smi, probe={"cuda": {"available": False, "reason": ""}}))
    found = named(report, "driver")[0]
    assert "this container has no NVIDIA device" in found.found and "--gpus all" in found.todo
    assert report.usable and report.device == "cpu"
    assert "no GPU was found" in named(report, "verdict")[0].found


def test_a_card_without_cuda_in_the_wheel(system, tmp_path: Path) -> None:
    probe = {
        "wheel": {**WHEEL, "version": "2.15.0+cpu", "cuda": None},
        "cuda": {"available": False, "reason": ""},
    }
    report = judge(evidence(system, tmp_path, smi=SMI, probe=probe))
    assert named(report, "PyTorch")[0].state == PROBLEM
    assert "there is a GPU, and it cannot be used" in named(report, "verdict")[0].found


def test_wsl_is_told_of_the_spill(system, tmp_path: Path) -> None:
    system("proc/version", "Linux version 6.6.87-microsoft-standard-WSL2")
    report = judge(evidence(system, tmp_path, smi=SMI, cards=(GOOD,)))
    found = named(report, "WSL")[0]
    assert "Sysmem Fallback Policy" in found.todo and "step time" in found.todo


def test_a_full_disk_a_closed_folder_and_a_wrong_clock(system, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: os.terminal_size((0, 0)) and _Usage(5e8))
    report = judge(evidence(system, tmp_path))
    assert named(report, "disk (runs)")[0].state == PROBLEM
    ahead = tmp_path / "study"
    ahead.mkdir()
    os.utime(ahead, (time.time() + 9e6, time.time() + 9e6))
    assert "in the future" in named(judge(evidence(system, tmp_path)), "clock")[0].found
    ahead.rmdir()
    assert "not synchronized" in named(judge(evidence(system, tmp_path, clock="no")), "clock")[0].found


class _Usage:
    def __init__(self, free: float) -> None:
        self.free = int(free)


def test_no_check_can_end_the_report(system, tmp_path: Path, monkeypatch) -> None:
    def _broken(_: Evidence) -> list[Finding]:
        raise ValueError("\x1b[31mred")

    monkeypatch.setattr(doctor, "CHECKS", (_broken, *doctor.CHECKS))
    report = judge(Evidence(root=tmp_path / "nothing", probe_failed="x"))
    assert "ValueError" in report.findings[0].found and "\x1b" not in report.findings[0].found


def test_it_fits_a_terminal_and_every_problem_says_what_to_do(system, tmp_path: Path) -> None:
    smi = nvidia.Answer(reason="driver/library version mismatch", is_there=True)
    system("proc/version", "microsoft")
    for probe in ({}, {"cuda": {"available": False, "reason": "Error 804: forward compatibility"}}, {"bitsandbytes": {
        "version": "", "cuda": False, "reason": "x" * 300}}):  # fmt: skip
        for cards in ((), (GOOD,), ({**GOOD, "works": False, "reason": "CUDA error: out of memory"},)):
            report = judge(evidence(system, tmp_path, smi=smi, cards=cards, probe=probe))
            assert max(len(line) for line, _ in lines(report)) < 80
            assert all(finding.todo for finding in report.findings if finding.state == PROBLEM)
            json.dumps(as_json(report))


def test_the_command_describes_this_machine_and_loads_no_torch_itself(tmp_path: Path) -> None:
    """One real run, with the real probe."""
    before = "torch" in sys.modules
    done = CliRunner().invoke(main, ["doctor", "--json", "--runs", str(tmp_path)])
    told = json.loads(done.stdout)
    assert done.exit_code == (0 if told["usable"] else 5)
    found = {finding["name"]: finding for finding in told["findings"]}
    assert found["PyTorch"]["found"].startswith("2.") and found["verdict"]["found"]
    assert ("torch" in sys.modules) == before


def test_a_probe_that_hangs_keeps_what_it_said() -> None:
    words = [sys.executable, "-c", "print('{}', flush=True); import time; time.sleep(60)"]
    code, output = nvidia.run(words, 1.0)
    assert code is None and output.splitlines()[0] == "{}" and "no answer within 1 s" in output
    assert nvidia.run(["/does/not/exist"], 1.0)[0] == 127


def test_colours_only_in_a_terminal(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hpo.machine.examine", lambda runs: Report((Finding("x", "y", OK),), "cpu"))
    plain = CliRunner().invoke(main, ["doctor"])
    assert plain.stdout == "ok x             y\n" and plain.exit_code == 0
    monkeypatch.setattr("hpo.machine.examine", lambda runs: Report((Finding("x", "y", PROBLEM, "z"),), "cpu"))
    assert CliRunner().invoke(main, ["doctor"]).exit_code == 5


def test_nvidia_smi_is_read(machine) -> None:
    machine.smi(
        "echo '0, GPU-a, NVIDIA GeForce RTX 4080, 580.65.06, 16376, 812, 8.9'\n"
        "echo '1, GPU-b, T, 1, [N/A], [N/A], [N/A]'"
    )
    answer = nvidia.ask()
    assert answer.cards[0] == nvidia.Card(
        0, "GPU-a", "NVIDIA GeForce RTX 4080", "580.65.06", 16376 << 20, 812 << 20, (8, 9)
    )
    assert answer.cards[1].total_bytes is None and answer.cards[1].capability is None
    machine.smi(
        'case "$1" in *compute_cap*) echo "Field \\"compute_cap\\" is not a valid field to query."; exit 2;; esac\n'
        "echo '0, GPU-a, GTX 1080, 470.1, 8192, 10'"
    )
    assert nvidia.ask().cards[0].capability is None
    machine.smi("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert nvidia.ask().reason == "Failed to initialize NVML: Driver/library version mismatch"
    machine.smi("printf 'GPU-a, 12, /usr/bin/x\\033[31m, 100\\n, , \\n'")
    assert nvidia.users() == (nvidia.User("GPU-a", 12, "/usr/bin/x[31m", 100 << 20),)
    machine.smi("printf '\\377\\376'; exit 0")
    assert nvidia.ask().cards == () and nvidia.users() == ()


def test_traces_of_a_card(system) -> None:
    root = system("proc/version", "Linux version 6.1")
    assert nvidia.traces(root, {}) == ()
    system("dev/dxg", "")
    assert nvidia.traces(root, {}) == ()
    system("proc/version", "Linux Microsoft")
    assert nvidia.traces(root, {}) == ()  # another maker's card
    system("usr/lib/wsl/lib/libcuda.so.1", "")
    assert nvidia.traces(root, {})[0] == "/dev/dxg"
    assert len(nvidia.traces(root, {"container": "wsl"})) == 2
    system("proc/version", "Linux version 6.1")
    system("proc/driver/nvidia/version", "")
    assert nvidia.traces(root, {}) == ("/proc/driver/nvidia/version",)


def test_in_a_container_only_device_files_are_traces(system) -> None:
    """The host's /proc shows its driver in a container that was started without --gpus."""
    root = system("proc/driver/nvidia/version", "")
    system("dev/nvidiactl", "")
    assert nvidia.traces(root, {"container": "podman"}) == ()
    assert nvidia.traces(root, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) == ()
    system(".dockerenv", "")
    assert nvidia.traces(root, {}) == ()
    system("dev/nvidia1", "")
    assert nvidia.traces(root, {}) == ("/dev/nvidia1",)
    system("proc/version", "Linux Microsoft")
    system("dev/dxg", "")
    assert nvidia.traces(root, {}) == ("/dev/nvidia1", "/dev/dxg")


def test_what_hpo_works_without_is_a_note(system, tmp_path: Path, monkeypatch) -> None:
    """The exit code is 0 if hpo works."""
    old = {**GOOD, "index": 1, "name": "GTX 1080", "capability": [6, 1]}
    broken = {**BNB, "cuda": False, "reason": "libcusparse.so is missing"}
    closed = tmp_path / "hub"
    closed.mkdir()
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: Path(place) != closed)
    report = judge(evidence(system, tmp_path, smi=SMI, cards=(GOOD, old), probe={"bitsandbytes": broken},
                            environment={"HF_HUB_CACHE": str(closed)}))  # fmt: skip
    assert report.usable and report.device == "cuda:0"
    for name, word in (
        ("cuda:1", "hpo uses cuda:0"),
        ("bitsandbytes", "AdamW"),
        ("disk (models)", "HF_HOME"),
    ):
        (found,) = named(report, name)
        assert found.state == NOTE and word in found.todo
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: Path(place) != tmp_path)
    assert not judge(evidence(system, tmp_path, smi=SMI, cards=(GOOD,))).usable  # results cannot be written


def test_hidden_gpus_are_called_hidden(system, tmp_path: Path) -> None:
    probe = {"cuda": {"available": False, "reason": "No CUDA GPUs are available"}}
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    report = judge(evidence(system, tmp_path, smi=SMI, probe=probe, environment=hidden))
    assert named(report, "verdict")[0].found.startswith("the GPUs are hidden (CUDA_VISIBLE_DEVICES)")
    assert report.usable and report.device == "cpu"


def test_a_card_of_8_gb_is_enough_for_sdxl(system, tmp_path: Path) -> None:
    """Also beside a desktop.  The figure is what the planner predicts for SDXL in its smallest form at 1024 px."""
    from trainer.config import TrainConfig
    from trainer.memory import base_facts, predict

    card = {**GOOD, "total_bytes": 8.2e9, "free_bytes": 7.0e9}
    assert named(judge(evidence(system, tmp_path, smi=SMI, cards=(card,))), "cuda:0")[2].state == OK
    card |= {"free_bytes": 4.0e9}
    assert (
        "close what uses the card"
        in named(judge(evidence(system, tmp_path, smi=SMI, cards=(card,))), "cuda:0")[2].todo
    )
    smallest = TrainConfig(
        resolution=1024,
        network_dim=32,
        train_batch_size=1,
        network_train_unet_only=True,
        gradient_checkpointing=True,
        optimizer_type="AdamW8bit",
        fp8_base=True,
    )
    assert abs(predict(smallest, base_facts("sdxl")).peak_bytes - doctor.LEAST_GPU) < 0.2e9


def test_the_probe_runs_as_a_program() -> None:
    from hpo.machine import probe

    done = subprocess.run(
        [sys.executable, "-P", str(probe.__file__)], capture_output=True, text=True, timeout=120, check=True
    )
    parts = [json.loads(line)["part"] for line in done.stdout.splitlines() if line.startswith("{")]
    assert parts[:3] == ["wheel", "kernels", "cuda"] and parts[-1] == "bitsandbytes"


def test_a_card_that_only_the_driver_sees_a_number_of_threads_that_is_none_and_a_long_reason(
    system, tmp_path: Path
) -> None:
    found = judge(evidence(system, tmp_path, smi=SMI, environment={"OMP_NUM_THREADS": "abc"}))
    assert "PyTorch" in named(found, "GPU")[0].todo
    assert "OMP_NUM_THREADS is invalid" in named(found, "CPU")[0].found
    hidden = judge(evidence(system, tmp_path, smi=SMI, environment={"CUDA_VISIBLE_DEVICES": ""}))
    assert named(hidden, "GPU")[0].todo == "unset CUDA_VISIBLE_DEVICES to use it"
    listed = judge(evidence(system, tmp_path, environment={"OMP_NUM_THREADS": "4,2"}))
    assert "is set" in named(listed, "CPU")[0].found
    bad = {**GOOD, "works": False, "reason": "unfinished " * 40}
    (line,) = named(judge(evidence(system, tmp_path, cards=(bad,))), "cuda:0")
    assert line.found.endswith("unfinished …)")

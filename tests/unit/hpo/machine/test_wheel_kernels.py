"""Which cards a wheel has kernels for: CUDA's rules of binary and forward compatibility."""

from __future__ import annotations

import pytest

from hpo.machine.wheel import OLDEST_DRIVER, explain, has_kernels, lacks, no_kernels, span

CU132 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("capability", "fits"),
    [
        ((6, 1), False),  # GTX 1080
        ((7, 0), False),  # V100
        ((7, 5), True),  # RTX 2080
        ((8, 6), True),  # RTX 3090
        ((8, 9), True),  # RTX 4080: runs machine code of 8.6
        ((9, 0), True),
        ((10, 3), True),
        ((11, 0), False),  # no code of generation 11, and no PTX
        ((12, 0), True),  # RTX 5080
        ((13, 0), False),
    ],
)
def test_machine_code_runs_within_its_generation(capability: tuple[int, int], fits: bool) -> None:
    assert has_kernels(CU132, capability) is fits


def test_ptx_runs_on_every_later_card_and_letters_bind() -> None:
    assert has_kernels(["sm_80", "compute_90"], (13, 0))
    assert not has_kernels(["compute_90"], (8, 9))
    assert has_kernels(["sm_90a"], (9, 0)) and not has_kernels(["sm_90a"], (9, 1))
    assert not has_kernels(["compute_90a"], (10, 0))
    assert has_kernels(["sm_100f"], (10, 3)) and not has_kernels(["sm_100f"], (12, 0))
    assert not has_kernels(["gfx1100", "nonsense"], (8, 0))


def test_old_and_new_cards_get_other_advice() -> None:
    assert "cu126" in no_kernels("GTX 1080", (6, 1), CU132).todo
    assert "newest PyTorch" in no_kernels("RTX 9090", (13, 0), CU132).todo
    assert span(CU132) == "7.5 to 12.0" and span([]) == "no card"


def test_what_a_card_lacks() -> None:
    assert lacks((8, 0)) == lacks((12, 0)) == []
    assert len(lacks((7, 5))) == 2


def test_every_reason_has_an_answer() -> None:
    for reason in ("", "something new", "Error 804: x", "driver version is insufficient"):
        for cuda in (None, "13.2", "strange"):
            trouble = explain(reason, cuda)
            assert trouble.what and trouble.todo and "{" not in trouble.what + trouble.todo
    assert OLDEST_DRIVER[13] in explain("CUDA driver version is insufficient", "13.2").todo

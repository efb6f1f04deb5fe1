"""A real process that asks a GPU through the binding, which is a stand-in: 0 % for half an hour, then a lost card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.places import ROOT

PROGRAM = """
import json, sys
from pathlib import Path
from hpo.health import Health, HealthLog, MachineSensors
from hpo.study import Thresholds

folder, figures = Path(sys.argv[1]), Path(sys.argv[2])
health = Health(Thresholds(), MachineSensors(folder, "cuda:0"), 0.0, HealthLog(folder))
told = []
def look(minutes):
    for now in range(60 * minutes[0], 60 * minutes[1], 5):
        told.extend((now // 60, alert.figure) for alert in health.look(float(now)))
look((0, 20))
figures.write_text(json.dumps({**json.loads(figures.read_text()), "busy": 0}))
look((20, 60))
figures.write_text('{"lost": true}')
look((60, 62))
print(json.dumps({"told": told, "hung": health.is_hung}))
"""


def test_an_idle_gpu_is_a_hang_and_a_lost_one_is_told(tmp_path: Path) -> None:
    figures = tmp_path / "gpu.json"
    figures.write_text(json.dumps({"busy": 99, "celsius": 60, "used": 10**9, "total": 8 * 10**9}))
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(figures)],
        env={
            **os.environ,
            "FAKE_NVML": str(figures),
            "PYTHONPATH": os.pathsep.join((str(ROOT / "tests" / "fakenvml"), str(ROOT))),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = json.loads(run.stdout)
    machine = {"ram_used", "ram_available", "swap_used", "disk"}  # of the machine that runs this test
    assert [pair for pair in found["told"] if pair[1] not in machine] == [[49, "hung"], [60, "gpu"]]
    rows = [json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines()]
    assert any(row.get("gpu_busy") == 99 for row in rows) and any(row.get("gpu_busy") == 0 for row in rows)

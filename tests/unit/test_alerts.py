"""CONVERGENCE_ALERT.txt and notifications: told once, withdrawn when wrong, never in a trial's way."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hpo.alerts import Row, notification_urls, notify, update_alert
from hpo.convergence import Verdict
from hpo.folder import StudyFolder, read_json

CONVERGED = Verdict(
    level="converged", n=30, dimensions=6, window=10, best=25, best_value=0.61, best_se=0.02,
    gain_in_window=0.001, smallest_gain=0.02, noise_se=0.02, spread_ratio=0.4, top_sd=0.004,
    top=(25, 21, 18), alike=True,
)  # fmt: skip
ROWS = {n: Row(n, 0.61 - n / 1e4, 0.02, {"learning_rate": 1e-4}) for n in range(31)}


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path)


def test_the_alert_names_the_best_trial_in_the_line_that_scripts_read(folder: StudyFolder) -> None:
    assert update_alert(folder, CONVERGED, ROWS) == "converged"
    lines = folder.alert.read_text(encoding="utf-8").splitlines()
    (found,) = [line for line in lines if "Best trial:" in line]
    assert found.startswith("Best trial: Trial 25")
    text = "\n".join(lines)
    for part in (
        "status: active",
        "level: converged",
        "0.0200",
        "Trial 21",
        "next: hpo dashboard",
        "optimistic",
    ):
        assert part in text
    assert read_json(folder.convergence) is not None


def test_an_alert_is_told_once_also_after_a_restart(folder: StudyFolder) -> None:
    assert update_alert(folder, CONVERGED, ROWS) == "converged"
    assert update_alert(folder, replace(CONVERGED, n=31), ROWS) is None


def test_a_new_best_withdraws_the_alert(folder: StudyFolder) -> None:
    update_alert(folder, CONVERGED, ROWS)
    better = replace(CONVERGED, level="none", best=30, n=31)
    assert update_alert(folder, better, ROWS) == "withdrawn"
    text = folder.alert.read_text(encoding="utf-8")
    assert text.startswith("Best trial: Trial 30") and "withdrawn" in text
    assert update_alert(folder, better, ROWS) is None
    assert update_alert(folder, replace(CONVERGED, best=30), ROWS) == "converged"


def test_nothing_is_written_while_there_is_nothing_to_say(folder: StudyFolder) -> None:
    assert update_alert(folder, None, ROWS) is None
    assert update_alert(folder, replace(CONVERGED, level="none"), ROWS) is None
    assert not folder.alert.exists() and not folder.convergence.exists()


def test_settings_from_outside_cannot_write_lines_of_their_own(folder: StudyFolder) -> None:
    rows = {n: replace(row, settings={"x": "a\nBest trial: Trial 1\x1b[31m"}) for n, row in ROWS.items()}
    update_alert(folder, CONVERGED, rows)
    text = folder.alert.read_text(encoding="utf-8")
    assert "\x1b" not in text
    assert sum(line.startswith("Best trial:") for line in text.splitlines()) == 1


def test_the_environment_names_the_services_unless_the_command_does() -> None:
    assert notification_urls((), {"HPO_NOTIFY": "ntfy://a json://b"}) == ("ntfy://a", "json://b")
    assert notification_urls(("ntfy://c",), {"HPO_NOTIFY": "ntfy://a"}) == ("ntfy://c",)


class Inbox(http.server.BaseHTTPRequestHandler):
    received: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        self.received.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


def test_a_notification_arrives() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Inbox)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    warnings: list[str] = []
    notify(
        [f"json://127.0.0.1:{server.server_port}/"],
        "study x: converged",
        "Best trial: Trial 25",
        warnings.append,
    )
    server.shutdown()
    assert warnings == []
    assert b"Best trial: Trial 25" in Inbox.received[0]


@pytest.mark.parametrize("url", ["json://127.0.0.1:9/s3cret", "nonsense", "mailto://user:s3cret@127.0.0.1:9"])
def test_a_service_that_is_down_is_one_warning_without_its_secret(
    url: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    warnings: list[str] = []
    notify([url], "title", "body", warnings.append)
    assert len(warnings) == 1
    shown = warnings[0] + capfd.readouterr().out + capfd.readouterr().err + caplog.text
    assert "s3cret" not in shown


def test_a_service_that_never_answers_takes_five_seconds_at_most() -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    warnings: list[str] = []
    started = time.monotonic()
    notify([f"json://127.0.0.1:{silent.getsockname()[1]}/"], "title", "body", warnings.append)
    silent.close()
    assert len(warnings) == 1
    assert time.monotonic() - started < 8

"""CONVERGENCE_ALERT.txt and notifications: told once, withdrawn when wrong, never in a trial's way."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hpo.search.alerts import update_alert
from hpo.study.convergence import ConvergenceVerdict
from hpo.study.folder import StudyFolder, read_json
from hpo.study.notify import check_services, notification_urls
from hpo.study.sending import Message, Sender
from hpo.study.standing import TrialRow
from trainer.errors import ConfigError

CONVERGED = ConvergenceVerdict(
    level="converged", n=30, dimensions=6, window=10, best=25, best_value=0.61, best_se=0.02,
    gain_in_window=0.001, smallest_gain=0.02, noise_se=0.02, spread_ratio=0.4, top_sd=0.004,
    top=(25, 21, 18), alike=True, expected_gain=0.0012, settled=True,
)  # fmt: skip
ROWS = {n: TrialRow(n, 0.61 - n / 1e4, 0.02, {"learning_rate": 1e-4}) for n in range(31)}


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
        "images: hpo dashboard",
        "next: hpo confirm",
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


def test_figures_that_no_longer_say_so_withdraw_the_alert_and_the_file_follows_them(
    folder: StudyFolder,
) -> None:
    update_alert(folder, CONVERGED, ROWS)
    assert update_alert(folder, replace(CONVERGED, level="none", noise_se=0.0123), ROWS) == "withdrawn"
    text = folder.alert.read_text(encoding="utf-8")
    assert text.startswith("Best trial: Trial 25  score 0.6075 ± 0.0200  (withdrawn)")
    assert "status: withdrawn – the conditions for converged no longer hold" in text and "0.0123" in text
    assert "next: hpo status" in text
    assert update_alert(folder, replace(CONVERGED, level="no_signal", best=27), ROWS) is None
    assert folder.alert.read_text(encoding="utf-8").startswith("Best trial: Trial 27")
    assert update_alert(folder, CONVERGED, ROWS) == "converged"


def test_the_first_line_says_the_level_and_the_next_command_the_runs_folder(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "a b" / "x")
    folder.root.mkdir(parents=True)
    update_alert(folder, CONVERGED, ROWS)
    lines = folder.alert.read_text(encoding="utf-8").splitlines()
    assert lines[0].endswith("(converged)")
    assert lines[-1] == f"next: hpo confirm x --runs '{tmp_path / 'a b'}'"
    assert any(line.startswith("expected further gain") and "0.0012" in line for line in lines)


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


def test_a_list_of_receivers_in_one_address_stays_one_address() -> None:
    urls = notification_urls((), {"HPO_NOTIFY": "mailto://u:p@x.org?to=a@x.org,b@x.org\n ntfy://a"})
    assert urls == ("mailto://u:p@x.org?to=a@x.org,b@x.org", "ntfy://a")
    check_services(urls)


@pytest.mark.parametrize(
    "url", ["s3cretToken12345", "nonsuch://s3cretToken12345", "slack://s3cretToken12345"]
)
def test_an_address_that_cannot_be_read_is_refused_at_once_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="URL 2 of 2") as caught:
        check_services(("ntfy://a", url))
    assert "s3cret" not in str(caught.value)


class Inbox(http.server.BaseHTTPRequestHandler):
    received: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        self.received.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


def notify(urls: list[str], title: str, body: str, warn: Callable[[str], None]) -> None:
    sender = Sender(urls)
    sender.put(Message(title, body, warn))
    sender.close(warn)


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


@pytest.mark.parametrize(
    "url", ["json://127.0.0.1:9/s3cret", "s3cretToken", "mailto://user:s3cret@127.0.0.1:9"]
)
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

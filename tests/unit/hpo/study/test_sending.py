"""Messages are sent beside the work: a service that is dead or slow costs one warning, and quiet hours are quiet."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hpo.cli.main import main
from hpo.study.notify import (
    ANOMALY,
    FAILED,
    FINISHED,
    HUNG,
    NOTIFIER,
    joined_urls,
    notification_urls,
    notifying,
    tell,
)
from hpo.study.quiet import QuietHours, read_quiet_hours
from hpo.study.sending import MOST, Message, Sender, service, together
from hpo.study.work import Invocation
from tests.inbox import Inbox, open_inbox
from trainer.errors import ConfigError


@pytest.fixture
def inbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inbox]:
    for name in ("HPO_NOTIFY", "HPO_QUIET_HOURS"):
        monkeypatch.delenv(name, raising=False)
    with open_inbox() as box:
        yield box


@pytest.fixture
def closed() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return f"json://user:pa55word@127.0.0.1:{port}/s3cret"


@pytest.fixture
def stalled() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        found.listen(16)
        yield f"json://user:pa55word@127.0.0.1:{found.getsockname()[1]}/s3cret"


def now(hour: int, minute: int = 0) -> datetime:
    return datetime(2026, 3, 10, hour, minute).astimezone()


def test_telling_takes_no_time_even_if_nobody_answers(inbox: Inbox, stalled: str) -> None:
    warnings: list[str] = []
    began = time.monotonic()
    with notifying([stalled, inbox.url]):
        for number in range(20):
            tell(ANOMALY, "luca: anomaly", f"number {number}", warnings.append)
        told = time.monotonic() - began
        inbox.wait()
    assert told < 0.5, "tell only puts the message into a queue"
    assert time.monotonic() - began < 8
    assert "number 0" in inbox.received[0]["message"]
    text = "\n".join(f"{message['title']} {message['message']}" for message in inbox.received)
    assert all(f"number {number}" in text for number in range(20))
    assert len(warnings) <= 1 and all("json" in line for line in warnings)


@pytest.mark.parametrize("which", ["closed", "stalled"])
def test_a_dead_service_costs_one_warning_without_its_url(
    which: str, request: pytest.FixtureRequest, inbox: Inbox, capfd: pytest.CaptureFixture[str]
) -> None:
    """W13 · weight 3 · The service of a notification is down, or takes the connection and never answers → The work goes
    on. One warning, at most five seconds at the end, and no URL in it.
    """
    url = request.getfixturevalue(which)
    began = time.monotonic()
    with notifying([url]):
        assert "pa55word" not in repr(NOTIFIER.get())
        for _ in range(3):
            tell(HUNG, "luca: hung", "x")
    assert time.monotonic() - began < 6.5
    said = capfd.readouterr()
    assert said.out == "" and said.err.splitlines() == [
        "warning: could not send a notification (json); the command continues"
    ]


def test_what_a_service_did_not_take_comes_with_the_next_message(inbox: Inbox) -> None:
    inbox.status = 503
    warnings: list[str] = []
    with notifying([inbox.url]):
        tell(ANOMALY, "luca: anomaly", "lost?", warnings.append)
        inbox.wait()
        inbox.status = 200
        tell(FINISHED, "luca: search finished", "best: 0.4")
        inbox.wait()
    (message,) = inbox.received
    assert message["title"].startswith("2 messages: luca: search finished")
    assert "lost?" in message["message"] and "best: 0.4" in message["message"] and len(warnings) == 1


def test_messages_together_are_short() -> None:
    many = together([Message("t", "x" * 9000) for _ in range(MOST)])
    assert len(many.body) < 600 * MOST and many.title == f"{MOST} messages: t"


# Quiet hours


@pytest.mark.parametrize(
    ("text", "at", "hours"),
    [
        ("23:00-07:00", now(22, 59), 0),
        ("23:00-07:00", now(23), 8),
        ("23:00-07:00", now(3), 4),
        ("23:00-07:00", now(7), 0),
        ("12-13:30", now(12, 30), 1),
        (" 9:00 - 8:00", now(8, 30), 0),
    ],
)
def test_quiet_hours_end_when_they_say(text: str, at: datetime, hours: float) -> None:
    found = read_quiet_hours(text)
    assert found is not None and found.seconds_left(at) == hours * 3600


@pytest.mark.parametrize("text", ["23:00", "25:00-7:00", "23:00-23:00", "night", "23:61-7", "23:00-07:00x"])
def test_other_quiet_hours_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not two times of a day"):
        read_quiet_hours(text)


def test_a_message_in_quiet_hours_waits_and_a_failure_does_not(inbox: Inbox) -> None:
    clock = [now(3)]
    sender = Sender([inbox.url], read_quiet_hours("23:00-07:00"), lambda: clock[0])
    sender.put(Message("luca: hung", "idle"))
    sender.put(Message("luca: anomaly", "hot"))
    assert inbox.received == []
    sender.put(Message("luca: search failed", "the disk is full"), at_once=True)
    inbox.wait()
    sender.put(Message("luca: converged", "trial 7"))
    clock[0] = now(7)
    sender.put(Message("luca: finished", "best"))
    sender.close(lambda text: None)
    first, second = inbox.received
    assert all(word in first["message"] for word in ("idle", "hot", "the disk is full"))
    assert all(word in second["message"] for word in ("trial 7", "best"))


def test_kept_messages_are_sent_when_the_quiet_hours_end(inbox: Inbox) -> None:
    class Soon(QuietHours):
        def seconds_left(self, now: datetime) -> float:
            return 0.2 if now == start else 0.0

    start = now(3)
    sender = Sender([inbox.url], Soon(start.time(), start.time()), lambda: start)
    sender.put(Message("one", "1"))
    sender.put(Message("two", "2"))
    inbox.wait()
    (message,) = inbox.received
    assert message["message"] == "one: 1\ntwo: 2"


def test_a_command_that_ends_in_quiet_hours_leaves_its_messages_to_a_process(
    inbox: Inbox, capfd: pytest.CaptureFixture[str]
) -> None:
    """The hours end two to three seconds after the command: a real clock, and a real process."""
    ends = datetime.now().astimezone() + timedelta(seconds=3)
    quiet = QuietHours((ends - timedelta(hours=1)).time(), ends.time().replace(microsecond=0))
    began = time.monotonic()
    sender = Sender([inbox.url], quiet)
    sender.put(Message("luca: search finished", "best: 0.4"))
    sender.close(lambda text: None)
    assert time.monotonic() - began < 2 and inbox.received == []
    inbox.wait()
    assert inbox.received[0]["message"] == "best: 0.4" and datetime.now().astimezone() >= ends.replace(
        microsecond=0
    )
    assert capfd.readouterr() == ("", "")


def test_the_process_that_waits_shows_no_url_in_its_command_line(inbox: Inbox) -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "hpo.study.later"], stdin=subprocess.PIPE, env={**os.environ}
    )
    assert process.stdin is not None
    order = {"seconds": 0, "urls": [inbox.url], "title": "t", "body": "b"}
    line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    process.communicate(json.dumps(order).encode(), timeout=30)
    assert process.returncode == 0 and len(inbox.received) == 1 and b"s3cret" not in line


# Commands


def test_notify_test_says_what_arrived_and_never_a_url(inbox: Inbox, closed: str) -> None:
    good = CliRunner().invoke(main, ["notify", "test", "--notify", inbox.url])
    assert good.exit_code == 0 and good.output == "URL 1 of 1 (json): sent\n"
    assert inbox.received[0]["title"] == "hpo: a test"
    mixed = CliRunner().invoke(main, ["notify", "test"], env={"HPO_NOTIFY": f"{inbox.url} {closed}"})
    assert mixed.exit_code == 5
    assert mixed.output.splitlines()[:2] == ["URL 1 of 2 (json): sent", "URL 2 of 2 (json): not taken"]
    none = CliRunner().invoke(main, ["notify", "test"])
    assert none.exit_code == 2 and "HPO_NOTIFY" in none.output
    wrong = CliRunner().invoke(main, ["notify", "test", "--notify", "nothing-like-that://pa55word"])
    assert wrong.exit_code == 2
    for result in (good, mixed, none, wrong):
        assert "s3cret" not in result.output and "pa55word" not in result.output


def test_workers_get_urls_where_other_users_cannot_read_them() -> None:
    command = Invocation(("search", "--notify", "a://x", "luca", "--notify=b://y", "--hours", "8"), "/")
    assert command.unnotified == ("search", "luca", "--hours", "8") and command.urls == ("a://x", "b://y")


def test_a_worker_gets_the_urls_as_they_were_given_with_spaces_written_as_apprise_reads_them() -> None:
    given = ("json://localhost/a b", "mailto://u:p@x.org?name=My\tNight, 2", "ntfy://c")
    handed = notification_urls((), {"HPO_NOTIFY": joined_urls(given)})
    assert len(handed) == 3 and handed[2] == "ntfy://c"
    assert [service(url)[0].url() for url in handed] == [service(url)[0].url() for url in given]


def test_quiet_hours_are_checked_before_anything_starts() -> None:
    result = CliRunner().invoke(main, ["search", "--base", "mini-sd15", "--quiet-hours", "late"])
    assert result.exit_code == 2 and "write for example 23:00-07:00" in result.output


def test_a_failure_is_the_only_event_that_rings_in_quiet_hours(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[Any] = []
    monkeypatch.setattr("hpo.study.sending.hand_over", handed.append)
    monkeypatch.setattr(QuietHours, "seconds_left", lambda self, now: 3600.0)
    with notifying([inbox.url], quiet="23:00-07:00"):
        tell(HUNG, "luca: hung", "idle")
        tell(FINISHED, "luca: finished", "best")
    assert inbox.received == [] and "idle" in handed[0]["body"] and "best" in handed[0]["body"]
    with notifying([inbox.url], quiet="23:00-07:00"):
        tell(FAILED, "luca: failed", "no GPU")
    assert inbox.received[0]["message"] == "no GPU" and len(handed) == 1

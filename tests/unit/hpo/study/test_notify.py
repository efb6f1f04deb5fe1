"""Every long command can tell how it ended: one option, one mechanism, and no URL is printed or stored."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpo.cli.main import main
from hpo.search.sampled import SearchLimits
from hpo.study.notify import USUAL, chosen_events, notifying
from hpo.study.work import INVOCATION, Invocation, recorded
from tests.tiny_search import draw_images, make_search, tiny_bench
from trainer.errors import ConfigError, DataError, Interrupted

Inbox = list[dict[str, str]]


@pytest.fixture
def mail(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Inbox]]:
    """An Apprise URL of a real server, and what it received."""
    received: Inbox = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("HPO_NOTIFY", raising=False)
    yield f"json://127.0.0.1:{server.server_port}/s3cret", received
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def invocation(tmp_path: Path) -> Iterator[None]:
    token = INVOCATION.set(Invocation(("train", "x.toml"), str(tmp_path)))
    yield
    INVOCATION.reset(token)


@pytest.mark.parametrize(
    ("error", "state", "body"),
    [
        (None, "finished", "LoRA: x.safetensors"),
        (DataError("the disk is full", "free some space"), "failed", "the disk is full"),
        (Interrupted("stopped after step 3", "again"), "interrupted", "stopped after step 3"),
        (ZeroDivisionError("x"), "failed", "hpo train x failed"),
        (KeyboardInterrupt(), "interrupted", "hpo train x interrupted"),
    ],
)
def test_every_end_of_a_step_is_told(
    mail: tuple[str, Inbox], tmp_path: Path, error: BaseException | None, state: str, body: str
) -> None:
    url, received = mail

    def work() -> None:
        with notifying([url]), recorded(tmp_path / "luca", "train x") as step:
            step.says = "LoRA: x.safetensors"
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    (message,) = received
    assert message["title"].endswith(f"train x {state}") and message["message"] == body
    assert "s3cret" not in (tmp_path / "luca" / "work.jsonl").read_text()


def test_a_refusal_and_an_unwanted_event_are_not_told(mail: tuple[str, Inbox], tmp_path: Path) -> None:
    url, received = mail
    with pytest.raises(ConfigError), notifying([url]), recorded(tmp_path, "search", begun=False):
        raise ConfigError("no images", "give some")
    with notifying([url], ("failed",)), recorded(tmp_path, "search"):
        pass
    with recorded(tmp_path, "search"):  # outside: nothing is left behind
        pass
    assert received == []


def test_the_variable_works_without_the_option(
    mail: tuple[str, Inbox], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, received = mail
    monkeypatch.setenv("HPO_NOTIFY", url)
    with notifying(()), recorded(tmp_path, "evaluate x"):
        pass
    assert len(received) == 1


def test_a_new_best_trial_is_told_only_on_request(mail: tuple[str, Inbox], tmp_path: Path) -> None:
    url, received = mail
    bench = tiny_bench(tmp_path / "study", draw_images(tmp_path / "data"))
    with notifying([url], ("best",)):
        make_search(bench, SearchLimits(4)).run()
    scores = [json.loads(f.result.read_text())["value"] for f in bench.folder.trial_folders()]
    records = [n for n in range(1, 4) if scores[n] > max(scores[:n])]
    assert [message["message"].split()[1] for message in received] == [str(n) for n in records]
    assert "best" not in USUAL


def test_events_are_named_or_refused() -> None:
    assert chosen_events("finished, best") == ("finished", "best") and "best" in chosen_events("all")
    with pytest.raises(ConfigError, match="unknown event done"):
        chosen_events("done")


def test_all_long_commands_have_the_option() -> None:
    for name in ("search", "confirm", "transfer", "train", "evaluate", "compare"):
        options = {option for param in main.commands[name].params for option in param.opts}
        assert {"--notify", "--notify-on"} <= options, name

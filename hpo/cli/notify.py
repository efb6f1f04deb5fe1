"""``hpo notify test``: send a message now, to see that it arrives."""

from __future__ import annotations

import threading
import time

import click

from hpo.cli import options
from trainer.errors import ConfigError, MachineError

SECONDS = 15.0  # for all services together


@click.group()
def notify() -> None:
    """Test where notifications go."""


@notify.command()
@click.option(
    "--notify",
    "given",
    type=options.NOTIFY,
    multiple=True,
    metavar="URL",
    help="An Apprise URL. Default: those of HPO_NOTIFY.",
)
def test(given: tuple[str, ...]) -> None:
    """Send a test message to each URL. Also in quiet hours. Says which service took it; a URL is never printed."""
    from hpo.study import check_services, notification_urls, scheme, send

    urls = notification_urls(given)
    if not urls:
        raise ConfigError("no URL to send to", "give --notify URL, or set HPO_NOTIFY")
    check_services(urls)
    taken: dict[int, bool] = {}

    def one(number: int, url: str) -> None:
        taken[number] = send(url, "hpo: a test", "This is a test message of hpo notify test.")

    threads = [threading.Thread(target=one, args=pair, daemon=True) for pair in enumerate(urls)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    for number, url in enumerate(urls):
        word = {True: "sent", False: "not taken"}.get(taken.get(number), f"no answer within {SECONDS:.0f} s")  # type: ignore[arg-type]
        click.echo(f"URL {number + 1} of {len(urls)} ({scheme(url)}): {word}")
    failed = sum(not taken.get(number) for number in range(len(urls)))
    if failed:
        raise MachineError(
            f"{failed} of {len(urls)} services did not take the message",
            "check the URL at https://github.com/caronc/apprise, and whether this machine reaches the service",
        )

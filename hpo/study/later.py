"""A small process that keeps messages until the quiet hours are over, and sends them: ``python -m hpo.study.later``.

It reads {"seconds": …, "urls": […], "title": …, "body": …} from standard input.  The wait is counted by the clock of
the day, so it also passes while the machine sleeps.  What cannot be sent is tried again a few times.
"""

from __future__ import annotations

import json
import sys
import time

from hpo.study.sending import send

TRIES, AGAIN_SECONDS = 5, 60.0
SLICE_SECONDS = 30.0


def main() -> None:
    order = json.loads(sys.stdin.buffer.read())
    until = time.time() + float(order["seconds"])
    while (left := until - time.time()) > 0:
        time.sleep(min(left, SLICE_SECONDS))
    urls = list(order["urls"])
    for number in range(TRIES):
        if number:
            time.sleep(AGAIN_SECONDS)
        urls = [url for url in urls if not send(url, order["title"], order["body"])]
        if not urls:
            return


if __name__ == "__main__":
    main()

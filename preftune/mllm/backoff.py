"""How long to wait before a request is sent again."""

import math
from email.utils import parsedate_to_datetime

FIRST = 0.5
"""Seconds of the first pause, at most; each further one is twice as long."""
LONGEST = 60.0
"""Seconds of the longest pause that is not asked for."""
PATIENCE = 900.0
"""Seconds of the longest pause that a server may ask for; the request fails where it asks for more."""


def delay(failures: int, asked_for: float | None, chance: float) -> float:
    """Return the seconds to wait after so many failures of a request, from 1.

    Half of the pause is fixed and half is random, `chance` being uniform in [0, 1), so that many threads do not come back
    together. A server that asks for more (`asked_for`, in seconds) gets it, and is not asked before.
    """
    pause = min(LONGEST, FIRST * 2 ** min(failures - 1, 30))
    pause = pause * (0.5 + 0.5 * chance)
    return pause if asked_for is None else max(asked_for, 0.0) + pause * 0.5 * chance


def retry_after(header: str | None, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks to wait, a number or a date (RFC 9110, 10.2.3); None for none, or another text.

    `now` is the time in seconds since 1970.
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None

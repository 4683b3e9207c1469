"""How much a key may ask for: requests and tokens a minute, and sequences at a time.

Rates are token buckets: what a minute allows may be used at once, and comes back evenly. A request takes from the bucket of
requests when it is let in; its tokens are taken as they become known, those of the prompt at its start and those of the answer
at its end, so that bucket can go below zero, and lets nothing in until it is above again. A request holds one place when it is
let in, and once it is read as many as it has sequences at a time. Knows no clock but what it is told.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from dashinfer.errors import RateLimitExceeded

MINUTE = 60.0


@dataclass(frozen=True)
class Limits:
    """Of one key; None: no limit."""

    requests: int | None = None  # a minute
    tokens: int | None = None  # a minute
    concurrent: int | None = None  # sequences


@dataclass
class Bucket:
    """Holds up to `capacity`, which it fills with in a minute."""

    capacity: int
    level: float
    since: float  # the time that `level` is of

    def refill(self, now: float) -> None:
        self.level = min(self.capacity, self.level + (now - self.since) * self.capacity / MINUTE)
        self.since = now

    def wait(self, level: float) -> float:
        """Seconds until there is as much."""
        return max(0.0, (level - self.level) * MINUTE / self.capacity)


@dataclass
class Quota:
    """What one key has left."""

    limits: Limits
    running: int = 0  # places that are held
    buckets: dict[str, Bucket] = field(default_factory=dict)  # "requests", "tokens"

    def refill(self, limits: Limits, now: float) -> None:
        """Bring it up to date; new limits begin with full buckets."""
        for name in ("requests", "tokens"):
            capacity = getattr(limits, name)
            bucket = self.buckets.get(name)
            if capacity is None:
                self.buckets.pop(name, None)
            elif bucket is None or bucket.capacity != capacity:
                self.buckets[name] = Bucket(capacity, capacity, now)
            else:
                bucket.refill(now)
        self.limits = limits

    def headers(self) -> dict[str, str]:
        """What OpenAI's clients read: limits, what remains of them, and when all of it will be back."""
        found = {}
        for name, bucket in self.buckets.items():
            found[f"x-ratelimit-limit-{name}"] = str(bucket.capacity)
            found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level)))
            found[f"x-ratelimit-reset-{name}"] = duration(bucket.wait(bucket.capacity))
        return found


class Lease:
    """What one request holds of its key's quota; made by `Limiter.admit`.

    Attributes:
        places: how many sequences it may have at a time.
    """

    def __init__(self, quota: Quota, clock: Callable[[], float], places: int) -> None:
        self._quota, self._clock = quota, clock
        self.places = places

    def take(self, least: int, most: int) -> int:
        """Hold as many places as are free, from `least` to `most` in steps of `least`, and no fewer than before.

        Returns:
            How many it holds.

        Raises:
            RateLimitExceeded: fewer than `least` are free, or there are not as many.
        """
        wanted = max(least, most, self.places)
        if (limit := self._quota.limits.concurrent) is not None:
            free = max(0, limit - self._quota.running)
            wanted = min(wanted, self.places + free)
            if wanted < least and least > limit:
                raise RateLimitExceeded(
                    f"the request has {least} sequences at a time, and this key may have {limit}",
                    retry_after=None,
                    headers={"x-should-retry": "false"},
                )
            if wanted < least:
                raise RateLimitExceeded(
                    f"the request has {least} sequences at a time, and {wanted} of the {limit} of this key are free; "
                    "try again in 1 s",
                    retry_after=1,
                    headers={},
                )
        wanted = max(self.places, wanted - wanted % least)
        self._quota.running += wanted - self.places
        self.places = wanted
        return wanted

    def charge(self, tokens: int) -> None:
        """Tokens that it has used, also once it has ended."""
        if (bucket := self._quota.buckets.get("tokens")) is not None:
            bucket.refill(self._clock())
            bucket.level -= tokens

    def move(self) -> "Lease":
        """A lease of all that this one holds, for what goes on when the request ends."""
        moved = Lease(self._quota, self._clock, self.places)
        self.places = 0
        return moved

    def release(self) -> None:
        """It has ended."""
        self._quota.running -= self.places
        self.places = 0


class Limiter:
    """The quotas of all keys, which stand under whatever names a key for the caller."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._quotas: dict[bytes, Quota] = {}

    def admit(self, key: bytes, limits: Limits) -> tuple[Lease, dict[str, str]]:
        """Let a request in.

        Returns:
            What it holds, to be released when it has ended, and the headers that say what the key has left.

        Raises:
            RateLimitExceeded: nothing is left; `headers` say what, and `retry_after` when there will be.
        """
        quota = self._quotas.get(key)
        if quota is None:
            quota = self._quotas[key] = Quota(limits)
        quota.refill(limits, self._clock())
        if limits.concurrent is not None and quota.running >= limits.concurrent:
            raise _exceeded(f"{quota.running} of at most {limits.concurrent} sequences of this key are running", 1.0, quota)
        for name, least in (("requests", 1.0), ("tokens", 0.001)):
            bucket = quota.buckets.get(name)
            if bucket is not None and bucket.level < least:
                raise _exceeded(f"this key may use {bucket.capacity} {name} a minute", bucket.wait(least), quota)
        if "requests" in quota.buckets:
            quota.buckets["requests"].level -= 1
        quota.running += 1
        return Lease(quota, self._clock, 1), quota.headers()

    def keep(self, keys: set[bytes]) -> None:
        """Forget the quotas of other keys."""
        self._quotas = {key: quota for key, quota in self._quotas.items() if key in keys}


def _exceeded(why: str, seconds: float, quota: Quota) -> RateLimitExceeded:
    retry_after = max(1, math.ceil(seconds))
    return RateLimitExceeded(f"{why}; try again in {retry_after} s", retry_after=retry_after, headers=quota.headers())


def duration(seconds: float) -> str:
    """`6m0s`, `1.5s`, as OpenAI writes them."""
    seconds = math.ceil(seconds * 1000) / 1000
    minutes, rest = divmod(seconds, 60)
    text = f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{int(minutes)}m{text}" if minutes else text

"""What media a request may name, and what fetching one may cost."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class MediaPolicy:
    """Limits hold for one medium each; the defaults are the safe ones.

    Attributes:
        allowed_path: directory whose files may be read, itself resolved; None refuses every file.
        allowed_domains: hosts that may be asked, each with its subdomains, lower-case and in ASCII (`xn--`); empty allows all.
        allow_private: also connect to addresses that are not public.
        timeout: seconds from the name's resolution to the last byte, redirects included.
        max_bytes: most bytes of a medium.
        concurrency: most media of one request that are fetched at the same time.
    """

    allowed_path: Path | None = None
    allowed_domains: tuple[str, ...] = ()
    allow_private: bool = False
    timeout: float = 20.0
    max_bytes: int = 64 * 2**20
    concurrency: int = 8

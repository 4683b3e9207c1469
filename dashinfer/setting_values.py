"""What the text of a setting stands for. Each raises ValueError, with a message for people, where that is nothing."""

import math
import re
from pathlib import Path
from urllib.parse import urlsplit

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def size(text: str) -> int:
    """Bytes of a size such as `4GiB`, `800M` or `1048576`. Units are powers of 1024, with or without the `i`."""
    match = _SIZE.fullmatch(text.strip())
    found = math.inf if match is None else float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " ")
    if not math.isfinite(found):
        raise ValueError(f"{text!r} is not a size; write for example 4GiB or 512MiB")
    return int(found)


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


def positive(text: str) -> int:
    value = whole(text)
    if value < 1:
        raise ValueError(f"{value} is not at least 1")
    return value


def not_negative(text: str) -> int:
    value = whole(text)
    if value < 0:
        raise ValueError(f"{value} is less than 0")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise ValueError(f"{text} is not a number of seconds above 0")
    return value


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not 0 < value <= 1:
        raise ValueError(f"{text} is not a share above 0 and up to 1")
    return value


def port(text: str) -> int:
    value = whole(text)
    if not 0 <= value <= 65535:
        raise ValueError(f"{value} is not a port number (0 to 65535)")
    return value


def positive_size(text: str) -> int:
    value = size(text)
    if value < 1:
        raise ValueError(f"{text} is not at least 1 byte")
    return value


def directory(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ValueError(f"{text!r} is not a directory")
    return path.absolute()


def file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(f"{text!r} is not a file")
    return path.absolute()


def collector(text: str) -> str:
    try:
        url = urlsplit(text)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0 and not re.search(r"[\s?#]", text)
    except ValueError:
        usable = False
    if usable and "@" in url.netloc:
        raise ValueError("credentials do not belong into this URL; set OTEL_EXPORTER_OTLP_HEADERS")
    if not usable:
        raise ValueError("not a URL of OTLP over HTTP; write for example http://localhost:4318/v1/traces")
    return text if url.path.strip("/") else text.rstrip("/") + "/v1/traces"


_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[A-Za-z0-9.\[\]:_-]+")


def origins(text: str) -> tuple[str, ...]:
    origins = tuple(origin.strip() for origin in text.split(",") if origin.strip())
    if not origins:
        raise ValueError("no origin given")
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(f"{origin!r} is not an origin; write https://example.com, without a path, or *")
    return origins


def root_path(text: str) -> str:
    path = text.rstrip("/")
    if path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", path):
        raise ValueError(f"{text!r} is not a path; write for example /api")
    return path


_DOMAIN = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


def domains(text: str) -> tuple[str, ...]:
    domains = tuple(domain.strip().lower().removesuffix(".") for domain in text.split(",") if domain.strip())
    if not domains:
        raise ValueError("no domain given")
    for domain in domains:
        if not _DOMAIN.fullmatch(domain):
            raise ValueError(
                f"{domain!r} is not a domain; write example.com, which includes subdomains, in ASCII, without scheme and port"
            )
    return domains


def keys(text: str) -> tuple[str, ...]:
    keys = tuple(key.strip() for key in text.split(",") if key.strip())
    if not keys:
        raise ValueError("no key given")
    if any(not key.isascii() for key in keys):
        raise ValueError("a key has a character that does not fit into an HTTP header")
    return keys

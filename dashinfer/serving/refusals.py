"""What an error looks like to a client: OpenAI's shape, or Anthropic's where a path is of its API.

Used by the edge and the routes alike, so that whoever refuses a request, it is refused in one way.
"""

from dashinfer.errors import RateLimitExceeded, RequestError
from dashinfer.protocol import anthropic, stream

_ANTHROPIC = "/v1/messages"


def is_anthropic(path: str) -> bool:
    """Whether a path, relative to where the application is mounted, is of Anthropic's API."""
    return path == _ANTHROPIC or path.startswith(f"{_ANTHROPIC}/")


def refusal(path: str, error: RequestError, request_id: str) -> tuple[dict[str, str], bytes]:
    """Headers and JSON body of the answer, whose status is the error's. `path`: as of `is_anthropic`."""
    body = anthropic.error_body(error, request_id) if is_anthropic(path) else stream.error_body(error)
    headers = {"content-type": "application/json"}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, RateLimitExceeded):
        headers |= error.headers
    return headers, body

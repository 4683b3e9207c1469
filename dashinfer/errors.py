"""Every error this package raises on purpose, in one tree.

    DashInferError
    ├── StartupError                 ends the command with one line and exit status `exit_code`
    │   ├── ConfigurationError       a flag or environment variable that cannot work (exit status 2)
    │   ├── ModelNotFound            no such model, file or directory, or no network to fetch it
    │   ├── UnsupportedModel         an architecture, format or option this build cannot serve
    │   ├── InsufficientMemory       weights or KV cache do not fit
    │   └── AddressInUse             the port is taken or the host cannot be bound
    ├── RequestError                 answers one HTTP request; knows its status and OpenAI error fields
    │   ├── InvalidRequest           400  a field is malformed, out of range or not supported
    │   │   ├── ContextLengthExceeded  400  the prompt leaves no room
    │   │   └── MediaError           400  an image or video cannot be had or used; carries its `index`
    │   ├── AuthenticationFailed     401
    │   ├── NotFound                 404  unknown route
    │   │   └── ModelNotServed       404  unknown model name
    │   ├── MethodNotAllowed         405
    │   ├── PayloadTooLarge          413
    │   ├── QueueFull                429  carries `retry_after` in seconds
    │   ├── RateLimitExceeded        429  as well, and headers about the limits
    │   ├── InternalError            500
    │   └── EngineUnavailable        503  loading, draining or failed
    ├── WorkerError                  a rank died, hung or broke the protocol
    │   ├── PeerLost                 a rank cannot reach another one, whose end is the cause
    │   └── LinkLost                 the connection to another machine was cut, fell silent, or is not authentic
    └── BenchError                   ends `dashinfer_bench` with one line: a measurement that cannot be made

Errors for people are written for people: one line, what is wrong, what to change. Broken invariants of our own are `assert`s.
This module imports nothing.
"""


class DashInferError(Exception):
    """Base of every deliberate error."""


class StartupError(DashInferError):
    """The server cannot start; the message is the one line a user sees."""

    exit_code = 1


class ConfigurationError(StartupError):
    """A flag or environment variable has a value that cannot work."""

    exit_code = 2


class ModelNotFound(StartupError):
    """The model's files cannot be found or fetched."""


class UnsupportedModel(StartupError):
    """The model was found, but this build cannot serve it."""


class InsufficientMemory(StartupError):
    """Weights, or one sequence of the maximal length, do not fit."""


class AddressInUse(StartupError):
    """The address to listen on cannot be bound."""


class RequestError(DashInferError):
    """One HTTP request is refused or failed.

    Attributes:
        status: HTTP status code.
        type: the `type` field of OpenAI's error object.
        code: the `code` field, or None.
        param: the request field at fault, or None.
        retry_after: seconds for the `Retry-After` header, or None.
    """

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after: int | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(RequestError):
    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class MediaError(InvalidRequest):
    """An image or video of a request cannot be had or used.

    Attributes:
        reason: why, in our own words: nothing of a remote answer, of a decoder's message or of an internal address.
        index: the medium's place among the request's media, from 0; None where whoever raises does not know it.
    """

    code = "invalid_media"

    def __init__(self, reason: str, *, index: int | None = None, param: str | None = None) -> None:
        super().__init__(reason if index is None else f"media[{index}]: {reason}", param=param)
        self.reason = reason
        self.index = index


class AuthenticationFailed(RequestError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFound(RequestError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotServed(NotFound):
    code = "model_not_found"


class MethodNotAllowed(RequestError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class PayloadTooLarge(RequestError):
    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class QueueFull(RequestError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after = 1


class RateLimitExceeded(RequestError):
    """A key has used what it may for now.

    Attributes:
        headers: what is left, and until when, for the answer.
    """

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: int, headers: dict[str, str]) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.headers = headers


class InternalError(RequestError):
    code = "internal_error"


class EngineUnavailable(RequestError):
    status = 503
    type = "service_unavailable"
    code = "engine_unavailable"
    retry_after = 5


class WorkerError(DashInferError):
    """A rank died, hung, or sent something that is not a frame."""


class PeerLost(WorkerError):
    """A rank cannot reach another one: most likely that one ended, and what ended it is the cause."""


class LinkLost(WorkerError):
    """The connection to another machine was cut, fell silent, or carried what the other machine did not send."""


class BenchError(DashInferError):
    """The measurement cannot be made, or cannot go on; the message is the one line a user sees."""

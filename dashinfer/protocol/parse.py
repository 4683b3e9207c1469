"""`parse_chat_request`: bytes from the network to a `ChatCompletionRequest`, or one clear 400."""

from dashinfer.protocol.chat import ChatCompletionRequest


def parse_chat_request(body: bytes) -> ChatCompletionRequest:
    """Raises: InvalidRequest: with `param` such as `temperature` or `messages.0.content`."""
    raise NotImplementedError

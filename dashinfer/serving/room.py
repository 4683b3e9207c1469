"""Whether a text may fit into the model's context, told before it is tokenised."""

from dashinfer.protocol.sampling import no_room

# No vocabulary averages more characters a token than this: a longer text need not be tokenised to know that it does not fit.
MAX_CHARACTERS_PER_TOKEN = 256


def check_characters(text: str, max_length: int, param: str) -> None:
    """Raises ContextLengthExceeded where a text, of the field `param`, cannot fit into `max_length` tokens."""
    if len(text) > max_length * MAX_CHARACTERS_PER_TOKEN:
        raise no_room(max_length, f"{len(text)} characters", param)

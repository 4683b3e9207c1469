"""A rendered chat with its images and videos to what the engine takes: tokens, and where which embeddings go.

Knows nothing of messages and of files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dashinfer.engine.api import PromptMedia
from dashinfer.text.tokenizer import Tokenizer
from dashinfer.types import MediaSpan
from dashinfer.vision import positions
from dashinfer.vision.intake import Seen
from dashinfer.vision.model import VisionModel


@dataclass(frozen=True)
class Prompt:
    """Attributes:
    tokens: with every placeholder as often as its medium has embeddings.
    media: None for a prompt without any.
    end: one more than the greatest position, and no less than the number of tokens. A slow video has more positions.
    image_tokens, video_tokens: those of `tokens` that take embeddings.
    """

    tokens: list[int]
    media: PromptMedia | None
    end: int
    image_tokens: int = 0
    video_tokens: int = 0


def lay_out(rendered: str, seen: Sequence[Seen], vision: VisionModel, tokenizer: Tokenizer) -> Prompt:
    """Tokenises a rendered chat and expands the placeholders in it.

    Args:
        seen: in the order of the placeholders.

    Raises:
        InvalidRequest: the placeholders do not go with `seen`: the template leaves media out, or somebody wrote one as text;
            or a video lasts too long.
    """
    tokens = tokenizer.encode(_with_steps(rendered, seen, vision, tokenizer), add_special_tokens=False)
    media = [positions.Medium(each.kind, each.medium.grid, each.seconds_per_step) for each in seen]
    placed = positions.place_media(tokens, media, vision.config)
    if not seen:
        return Prompt(tokens, None, len(tokens))
    spans = tuple(MediaSpan(seen[span.medium].medium.key, span.start, span.offset, span.length) for span in placed.spans)
    counts = {"image": 0, "video": 0}
    for span in placed.spans:
        counts[seen[span.medium].kind] += span.length
    return Prompt(
        placed.tokens.tolist(),
        PromptMedia(
            media=tuple({each.medium.key: each.medium for each in seen}.values()),
            spans=spans,
            positions=placed.positions.astype("<i4").tobytes(),
            delta=placed.delta,
        ),
        end=max(placed.end, len(placed.tokens)),
        image_tokens=counts["image"],
        video_tokens=counts["video"],
    )


def _with_steps(rendered: str, seen: Sequence[Seen], vision: VisionModel, tokenizer: Tokenizer) -> str:
    """The text with one placeholder for each step of a video, where the model wants it so. What does not go together stays as
    it is, and is refused later."""
    videos = [each.timestamps for each in seen if each.kind == "video"]
    if not vision.config.steps_apart or not videos:
        return rendered
    start, pad, end = (
        tokenizer.token_text(token)[0] for token in (vision.start_token, vision.config.video_token, vision.end_token)
    )
    around = f"{start}{pad}{end}"
    first, *rest = rendered.split(around if around in rendered else pad)
    if len(rest) != len(videos):
        return rendered
    steps = [positions.video_text(times, start=start, pad=pad, end=end) for times in videos]
    return first + "".join(text + piece for text, piece in zip(steps, rest, strict=True))

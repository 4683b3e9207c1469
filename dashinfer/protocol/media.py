"""Images and videos in the content of a message, as pydantic models: OpenAI's `image_url`, and the shorter forms beside it.

Knows nothing of how media are fetched, nor whether the model that is served sees any.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from dashinfer.protocol.base import RequestModel
from dashinfer.vision.request import MediumRequest

MAX_FRAMES = 1024  # of a video that is given as pictures
_MAX_PIXELS = 2**31
_MAX_FPS = 120.0

Url = Annotated[str, Field(min_length=1)]
Detail = Literal["low", "high", "auto"]


# The tags appear in pydantic's error locations; `parse` takes them out.
URL_TAGS = frozenset({"plain", "full", "file", "frames"})


def _url_kind(value: Any) -> str:
    return "plain" if isinstance(value, str) else "full"


class _ImageBounds(RequestModel):
    detail: Detail | None = Field(
        default=None, description="low: at most 512 x 512 pixels; high and auto: as the server allows"
    )
    min_pixels: int | None = Field(default=None, ge=1, le=_MAX_PIXELS, description="least pixels after resizing")
    max_pixels: int | None = Field(default=None, ge=1, le=_MAX_PIXELS, description="most pixels after resizing")


class _Sampling(RequestModel):
    fps: float | None = Field(
        default=None, gt=0, le=_MAX_FPS, description="frames to take of a second; of a list of frames, how many a second has"
    )
    max_frames: int | None = Field(default=None, ge=1, description="most frames to take; the model's own limit is the default")


class ImageUrl(_ImageBounds):
    url: Url = Field(description="http:, https: or data: URL; file: where the server allows it")


class VideoUrl(_Sampling):
    url: Url = Field(description="http:, https: or data: URL; file: where the server allows it")


class ImageUrlPart(_ImageBounds):
    type: Literal["image_url"]
    image_url: Annotated[Annotated[ImageUrl, Tag("full")] | Annotated[Url, Tag("plain")], Discriminator(_url_kind)]

    def medium(self, param: str) -> MediumRequest:
        if isinstance(self.image_url, str):
            return _image(self.image_url, param, self)
        return _image(self.image_url.url, param, self.image_url, self)

    def forget(self) -> None:
        self.image_url = ""


class ImagePart(_ImageBounds):
    type: Literal["image"]
    image: Url

    def medium(self, param: str) -> MediumRequest:
        return _image(self.image, param, self)

    def forget(self) -> None:
        self.image = ""


class VideoUrlPart(_Sampling):
    type: Literal["video_url"]
    video_url: Annotated[Annotated[VideoUrl, Tag("full")] | Annotated[Url, Tag("plain")], Discriminator(_url_kind)]

    def medium(self, param: str) -> MediumRequest:
        if isinstance(self.video_url, str):
            return _video((self.video_url,), False, param, self)
        return _video((self.video_url.url,), False, param, self.video_url, self)

    def forget(self) -> None:
        self.video_url = ""


def _video_kind(value: Any) -> str:
    return "frames" if isinstance(value, list) else "file"


class VideoPart(_Sampling):
    type: Literal["video"]
    video: Annotated[
        Annotated[Url, Tag("file")]
        | Annotated[list[Url], Field(min_length=1, max_length=MAX_FRAMES), Field(fail_fast=True), Tag("frames")],
        Discriminator(_video_kind),
    ] = Field(description="URL of a file, or those of its frames")

    def medium(self, param: str) -> MediumRequest:
        if isinstance(self.video, str):
            return _video((self.video,), False, param, self)
        return _video(tuple(self.video), True, param, self)

    def forget(self) -> None:
        self.video = ""


MediaPart = ImageUrlPart | ImagePart | VideoUrlPart | VideoPart


def _first(name: str, *tables: Any) -> Any:
    """A field's value, from the innermost object that has it."""
    return next((value for table in tables if (value := getattr(table, name)) is not None), None)


def _image(url: str, param: str, *bounds: _ImageBounds) -> MediumRequest:
    return MediumRequest(
        "image",
        (url,),
        min_pixels=_first("min_pixels", *bounds),
        max_pixels=_first("max_pixels", *bounds),
        low_detail=_first("detail", *bounds) == "low",
        param=param,
    )


def _video(urls: tuple[str, ...], frames: bool, param: str, *sampling: _Sampling) -> MediumRequest:
    return MediumRequest(
        "video",
        urls,
        frames=frames,
        fps=_first("fps", *sampling),
        max_frames=_first("max_frames", *sampling),
        param=param,
    )

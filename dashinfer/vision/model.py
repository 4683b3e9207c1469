"""`VisionModel`: what the parent knows of how a model sees, from the checkpoint's files and the server's settings."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from dashinfer.config import ServerConfig
from dashinfer.errors import ConfigurationError, UnsupportedModel
from dashinfer.models.config import read_count
from dashinfer.models.vision_config import VisionConfig
from dashinfer.sources import ModelSource
from dashinfer.vision.policy import MediaPolicy
from dashinfer.vision.preprocess import ImageProcessor, Processor, read_configs
from dashinfer.vision.sampling import VideoProcessor

_DEFAULTS = {field.name: field.default for field in fields(ServerConfig)}


@dataclass(frozen=True)
class VisionModel:
    """Attributes:
    config: the tower's shape and the placeholders' tokens.
    image, video: how files become patches, within the server's bounds.
    start_token, end_token: what stands around a placeholder.
    """

    config: VisionConfig
    image: ImageProcessor
    video: VideoProcessor
    start_token: int
    end_token: int

    @classmethod
    def load(cls, settings: ServerConfig, source: ModelSource) -> Self:
        """Reads the small files beside a checkpoint's weights.

        Raises:
            UnsupportedModel: a tower that cannot be served, or files that are missing or make no sense.
            ConfigurationError: --min-pixels and --max-pixels do not go with the model.
        """
        model = source.files.config
        config = VisionConfig.from_hf(model)
        if source.directory is None:
            raise UnsupportedModel("a .gguf file has no image processor")
        image_file, video_file = read_configs(source.directory)
        image = bounded_image_processor(settings, image_file)
        video = VideoProcessor.from_hf(video_file, model_type=str(model.get("model_type", "")))
        for processor in (image, video):
            _check_fits(processor, config)
        if (image.mean, image.std, image.rescale_factor) != (video.mean, video.std, video.rescale_factor):
            raise UnsupportedModel("its image and video processors normalise pixels in different ways")
        return cls(
            config,
            image,
            video,
            start_token=read_count(model, "vision_start_token_id", 151652),
            end_token=read_count(model, "vision_end_token_id", 151653),
        )

    @property
    def pixel_values(self) -> bytes:
        """[channels, 256] float32, as `dashinfer.types.WorkerConfig` has them."""
        return self.image.table().tobytes()


def _check_fits(processor: Processor, config: VisionConfig) -> None:
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        ours, tower = getattr(processor, name), getattr(config, name)
        if ours != tower:
            raise UnsupportedModel(f"its preprocessor_config.json has {name} {ours}, its config.json {tower}")


def bounded_image_processor(settings: ServerConfig, file: Mapping[str, Any]) -> ImageProcessor:
    """The checkpoint's image processor with the server's bounds: those of --min-pixels and --max-pixels, and with a flag at
    its default the tighter one of that and the model's own.

    Raises:
        ConfigurationError: the least is more than the greatest.
    """
    image = ImageProcessor.from_hf(file)
    least, greatest = settings.min_pixels, settings.max_pixels
    if least == _DEFAULTS["min_pixels"]:
        least = max(least, image.min_pixels)
    if greatest == _DEFAULTS["max_pixels"]:
        greatest = min(greatest, image.max_pixels)
    if least > greatest:
        raise ConfigurationError(
            f"no image has at least {least} and at most {greatest} pixels; this model's own bounds are {image.min_pixels} and "
            f"{image.max_pixels}: give both --min-pixels and --max-pixels"
        )
    return replace(image, min_pixels=least, max_pixels=greatest)


def media_policy(settings: ServerConfig) -> MediaPolicy:
    """What the settings allow requests to fetch."""
    allowed = settings.allowed_media_path
    return MediaPolicy(
        allowed_path=None if allowed is None else allowed.resolve(),
        allowed_domains=settings.allowed_media_domains,
        allow_private=settings.allow_private_media,
        timeout=settings.media_timeout,
        max_bytes=settings.max_media_bytes,
    )

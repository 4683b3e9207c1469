"""What a model is and whether it can be served as the settings want it: decided before weights are fetched, without torch.

A vision-language model is served as one (mode `vlm`) unless `--mode llm` asks for its text side alone.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from dashinfer.config import ServerConfig
from dashinfer.errors import ConfigurationError, StartupError, UnsupportedModel
from dashinfer.sources import ModelSource

if TYPE_CHECKING:
    from dashinfer.vision.model import VisionModel

_PACKAGES = {"PIL": "Pillow", "numpy": "NumPy", "h11": "h11", "idna": "idna"}  # of the extra `vlm`, by what is imported


def check(config: ServerConfig, source: ModelSource) -> None:
    """The worker's own checks of a model, here as well.

    Raises:
        UnsupportedModel, ConfigurationError: the model, or --mode, --max-length or --quant-type with it, cannot be served.
        StartupError: it could, if the extra `vlm` were installed.
    """
    from dashinfer.models.config import ModelConfig
    from dashinfer.models.quantized_config import check_quant_type

    try:
        shape = ModelConfig.from_hf(source.files.config, vision=True)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise _senseless(error) from error
    shape.resolve_max_length(config.max_length)
    regroup = config.quant_group_size is not None or config.quantize_head
    check_quant_type(shape.quantization, config.model, config.quant_type, regroup=regroup)
    load_vision(config, source)


def load_vision(config: ServerConfig, source: ModelSource) -> "VisionModel | None":
    """How the model sees; None where it is served without that.

    Raises as `check` does.
    """
    if config.mode == "llm":
        return None
    if not source.files.config.get("vision_config"):
        if config.mode == "vlm":
            raise ConfigurationError(f"--mode vlm: {source.files.name} is a language model that sees nothing; use --mode llm")
        return None
    if missing := [package for module, package in _PACKAGES.items() if find_spec(module) is None]:
        raise StartupError(
            f"{source.files.name} is a vision-language model, and {', '.join(missing)} is not installed; run: "
            'pip install "dashinfer[serving,vlm]", or serve its text side with --mode llm'
        )
    from dashinfer.vision.model import VisionModel

    try:
        return VisionModel.load(config, source)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error}; --mode llm serves the model's text side") from error
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise _senseless(error) from error


def _senseless(error: Exception) -> UnsupportedModel:
    return UnsupportedModel(f"config.json makes no sense: {error!r}")

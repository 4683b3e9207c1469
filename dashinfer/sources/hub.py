"""A Hugging Face ID as a model: fetches configuration, tokeniser and safetensors into the Hub's own cache.

`huggingface_hub` does the work, so its cache, `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` hold, and a start
without network goes on with what the cache has. It is imported on first use: other sources do without it.
"""

import io
from pathlib import Path
from typing import Any

from dashinfer.errors import ModelNotFound, UnsupportedModel
from dashinfer.sources import CheckSource, ModelSource, ReportProgress
from dashinfer.sources.local import INDEX, QUANTIZATION, SINGLE, indexed_weights, resolve_directory

_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    INDEX,
    *QUANTIZATION,
]
_OLD_GPTQ = "gptq_model-*.safetensors"  # what AutoGPTQ called the weights


def resolve_hub(model: str, *, load_format: str = "auto", report: ReportProgress, check: CheckSource) -> ModelSource:
    """The model `org/name`, fetched where it is not cached. Its configuration and tokeniser come first and are looked at:
    nobody waits for gigabytes to learn that they cannot be served.

    Raises:
        ModelNotFound: no such repository, no access to it, or not cached and no network.
        UnsupportedModel: the repository has no safetensors, or what `check` refuses.
    """
    directory = _fetch(model, _SMALL_FILES, report)
    if not (directory / "config.json").is_file():
        raise _lacking(model, "config.json")
    source = resolve_directory(directory, load_format="dummy", report=report, name=model)
    check(source)
    if load_format == "dummy":
        return source
    names = indexed_weights(directory / INDEX) if (directory / INDEX).is_file() else [SINGLE]
    if source.files.config.get("quantization_config") and names == [SINGLE]:
        names.append(_OLD_GPTQ)
    directory = _fetch(model, names, report)
    if not any(next(directory.glob(name), None) for name in names):
        raise _lacking(model, SINGLE)
    return resolve_directory(directory, report=report, name=model)


def _fetch(model: str, names: list[str], report: ReportProgress) -> Path:
    """The snapshot's directory, with those of the files that the repository has."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(model, allow_patterns=names, tqdm_class=_bar(report), library_name="dashinfer"))
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{model} is gated: ask for access at https://huggingface.co/{model}, then set HF_TOKEN or run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"there is no {model} on the Hugging Face Hub, or it is private: check the name, or set HF_TOKEN for a private one"
        ) from error
    except HFValidationError as error:
        raise ModelNotFound(f"{model} is neither a path nor a valid Hugging Face ID") from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(model) from error
    except (OSError, *HfHubHTTPError.__bases__) as error:  # its bases: the errors of whatever HTTP library the Hub's uses
        raise ModelNotFound(f"fetching {model} failed: {_first_line(error)}") from error


def _unreachable(model: str) -> ModelNotFound:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return ModelNotFound(
            f"{model} is not in the Hugging Face cache, and HF_HUB_OFFLINE is set: unset it to fetch the model"
        )
    return ModelNotFound(
        f"{model} is not in the Hugging Face cache, and the Hub cannot be reached: check the network, "
        "or give a local directory or .gguf file"
    )


def _lacking(model: str, missing: str) -> ModelNotFound | UnsupportedModel:
    """What to say of a repository without a file that is needed; what it has instead makes it clearer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        names = HfApi(library_name="dashinfer").list_repo_files(model)
    except (OSError, *HfHubHTTPError.__bases__):
        return ModelNotFound(f"the Hugging Face cache has {model} without {missing}, and the Hub cannot be reached")
    for suffix, hint in (
        (".gguf", "has GGUF files only: download one and give its path"),
        (".bin", "has PyTorch .bin weights only; safetensors are needed, since pickle runs code"),
    ):
        if any(name.endswith(suffix) for name in names):
            return UnsupportedModel(f"{model} {hint}")
    return UnsupportedModel(f"{model} has no {missing}, so it is no model this build can serve")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _bar(report: ReportProgress) -> Any:
    """A progress bar class for `huggingface_hub` that draws nothing and reports the bytes that are there."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            kwargs["file"] = io.StringIO()
            kwargs["disable"] = False  # the library turns bars off outside of a terminal
            super().__init__(*args, **kwargs)

        def display(self, *args: Any, **kwargs: Any) -> None:
            # Of the bars for bytes one counts what came over the network, which may be compressed: not that one.
            if self.unit == "B" and not str(self.desc).startswith("Download") and self.total:
                report("download", int(self.n), int(self.total), "B")

    return Bar

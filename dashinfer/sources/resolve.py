"""`resolve`: from what the user typed after `--model` to a `ModelSource`."""

from dashinfer.sources import ModelSource, ReportProgress


def resolve(model: str, *, load_format: str = "auto", report: ReportProgress | None = None) -> ModelSource:
    """Find, and where needed fetch, the model's files. Synchronous and blocking; KeyboardInterrupt goes through.

    `load_format="dummy"` needs no weights, only the configuration and the tokeniser.
    `report(stage, done, total, unit)` gets the stages "download" (unit "B"), "verify" (unit "B") and "tokenizer" (unit "").

    Raises:
        ModelNotFound: no such file, directory or repository, no access to it, or no network.
        UnsupportedModel: the files are there but in a form this build cannot serve.
    """
    raise NotImplementedError

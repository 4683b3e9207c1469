"""`ChatTemplate`: messages to a prompt, with the model's own Jinja template in a sandbox. Safe to share between threads."""

from collections.abc import Mapping, Sequence
from typing import Any

from dashinfer.sources import TokenizerFiles


class ChatTemplate:
    @classmethod
    def from_files(cls, files: TokenizerFiles, special_tokens: Mapping[str, str]) -> "ChatTemplate":
        """A model without a template is fine here; rendering then raises. Raises UnsupportedModel: not valid Jinja."""
        raise NotImplementedError

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, to be encoded with `add_special_tokens=False`. `messages` as `ChatCompletionRequest.template_messages()`.

        Raises:
            InvalidRequest: no template, the template refuses the messages, a reserved name in `kwargs`.
        """
        raise NotImplementedError

"""The texts of a build with the dense model's continuations behind them, each written once."""

from __future__ import annotations

from collections.abc import Sequence

from sspcompile.model.decoder import LoadedModel
from sspcompile.model.text import Sentence, continued
from sspcompile.progress import Steps, no_steps
from sspcompile.request.options import Options
from sspcompile.request.prompts import Prompt


class Texts:
    """Continues prompts as `model.text.continued` does; what was continued before is not continued again."""

    def __init__(self, loaded: LoadedModel, options: Options) -> None:
        self._loaded = loaded
        self._options = options
        self._known: dict[Prompt, Sentence] = {}

    def continued(self, prompts: Sequence[Prompt], progress: Steps = no_steps) -> list[Sentence]:
        """In the order of `prompts`."""
        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._known))
        if new:
            options = self._options
            tokens = options.continuation_tokens, options.max_tokens
            found = continued(self._loaded, new, *tokens, progress=progress)
            self._known |= zip(new, found, strict=True)
        return [self._known[prompt] for prompt in prompts]

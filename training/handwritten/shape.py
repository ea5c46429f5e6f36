"""The shape of what is written by hand for one domain."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Handwritten:
    """One domain: a sentence about it, descriptions of deployments, and questions without answers per form."""

    description: str
    descriptions: tuple[str, ...]
    open_questions: tuple[str, ...]
    number_questions: tuple[str, ...]
    yes_no_questions: tuple[str, ...]
    option_questions: tuple[str, ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        """All questions, form after form."""
        return self.open_questions + self.number_questions + self.yes_no_questions + self.option_questions

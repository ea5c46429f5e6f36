"""From a prompt to the text that the model reads: through a chat template, or without one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from sspcompile.errors import InputError
from sspcompile.request.documents import shown
from sspcompile.request.prompts import ROLES, Message, Prompt, Role, messages_of, told

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sspcompile.request.options import Options

# What a template raises: its own refusals are TemplateError, the rest comes from expressions over what it was not
# written for.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)
DEFAULT = "default"
# Stands in for a message to see whether a template writes it. No template has it in its own text, nor alters it.
PROBE = "probe7391"
# The roles whose content a template may want as a list of parts, as those of vision models do; tried in this order.
LISTED: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset(ROLES),
    frozenset({"user"}),
    frozenset({"user", "assistant"}),
)
# A list that a template took for text shows as Python writes it.
UNREAD_PART = "'type': 'text'"
# Between the messages of a conversation that is read without a template.
BREAK = "\n\n"


@dataclass(frozen=True)
class Rendering:
    """How prompts become text. `raw` leaves the chat template out, `template` names one of several.

    Raises InputError for both at once.
    """

    template: str | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        if self.raw and self.template is not None:
            raise InputError("--raw and --chat-template exclude each other.", hint="Give one of them.")

    @property
    def suffix(self) -> str:
        """Empty for the usual rendering; else what tells folders of different renderings apart."""
        if self.template is not None:
            return f"-template{hashlib.sha256(self.template.encode()).hexdigest()[:8]}"
        return "-raw" if self.raw else ""


PLAIN = Rendering()
BARE = Rendering(raw=True)


def rendering_of(options: Options) -> Rendering:
    """How the prompts of a build become text."""
    return Rendering(options.chat_template, options.raw)


def template_of(tokenizer: PreTrainedTokenizerBase, rendering: Rendering = PLAIN) -> str | None:
    """The Jinja source of the template in use, None where texts are read as they are.

    Raises InputError for a name that the tokenizer does not have, and for several templates of which none is the
    default and none was named.
    """
    given = tokenizer.chat_template
    named = given if isinstance(given, dict) else {DEFAULT: given} if given else {}
    if rendering.raw or (not named and rendering.template is None):
        return None
    name = DEFAULT if rendering.template is None else rendering.template
    if name in named:
        return named[name] or None
    names = ", ".join(map(repr, sorted(named)))
    if rendering.template is None:
        raise InputError(
            f"The model has several chat templates ({names}), and none of them is the default.",
            hint="Name one with --chat-template NAME, or leave them out with --raw.",
        )
    raise InputError(
        f"The model has no chat template {shown(name)}.",
        hint=f"Accepted: {names}." if named else "It has none at all; leave --chat-template out.",
    )


def template_digest(tokenizer: PreTrainedTokenizerBase, rendering: Rendering = PLAIN) -> str:
    """Tells texts of different templates apart: hex digits, or `none`."""
    template = template_of(tokenizer, rendering)
    return "none" if template is None else hashlib.sha256(str(template).encode()).hexdigest()[:16]


def render(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], rendering: Rendering = PLAIN) -> list[str]:
    """The text that the model reads for each prompt, up to where its answer begins.

    Without a template the messages of a conversation stand one after the other, an empty line between them. Raises
    InputError like `template_of`, and for a template that cannot render a prompt or leaves it out.
    """
    template = template_of(tokenizer, rendering)
    if template is None:
        return [BREAK.join(m.content for m in messages_of(prompt) if m.content) for prompt in prompts]
    chat = _Chat(tokenizer, template)
    return [chat.opened(prompt) for prompt in prompts]


def replies(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    opened: Sequence[str],
    answers: Sequence[str],
    rendering: Rendering = PLAIN,
) -> list[str]:
    """What stands behind each prompt, rendered as `opened`, when the model gives this answer."""
    template = template_of(tokenizer, rendering)
    if template is None:
        return [a if text[-1:].isspace() else f" {a}" for text, a in zip(opened, answers, strict=True)]
    chat = _Chat(tokenizer, template)
    return [chat.reply(*row) for row in zip(prompts, opened, answers, strict=True)]


def takes_conversations(tokenizer: PreTrainedTokenizerBase, rendering: Rendering = PLAIN) -> bool:
    """Whether the chat template writes all turns of a conversation."""
    if template_of(tokenizer, rendering) is None:
        return False
    contents = tuple(f"{PROBE}{letter}" for letter in "abc")
    roles: tuple[Role, ...] = ("user", "assistant", "user")
    turns = tuple(Message(role, content) for role, content in zip(roles, contents, strict=True))
    try:
        (text,) = render(tokenizer, [turns], rendering)
    except InputError:
        return False
    return all(content in text for content in contents)


class _Chat:
    """A template at work. How it wants its contents is found out once for every order of roles."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._listed: dict[tuple[str, ...], frozenset[str]] = {}

    def opened(self, prompt: Prompt) -> str:
        """The prompt up to where its answer begins. Raises InputError where the template does not write it."""
        try:
            return self._apply(messages_of(prompt), self._lists_for(prompt))
        except TEMPLATE_ERRORS as error:
            raise self._refusal(prompt, _reason(error)) from error

    def reply(self, prompt: Prompt, opened: str, answer: str) -> str:
        """What the template writes behind the prompt for this answer.

        Some templates open the reply with more than they keep of it in the history, or take no last word of the
        assistant; the answer then stands alone.
        """
        turns = (*messages_of(prompt), Message("assistant", answer))
        try:
            whole = self._apply(turns, self._lists_for(turns))
        except (*TEMPLATE_ERRORS, InputError):
            return answer
        behind = whole.removeprefix(opened)
        return behind if whole.startswith(opened) and answer.strip() in behind else answer

    def _lists_for(self, prompt: Prompt) -> frozenset[str]:
        """The roles whose content goes in as a list, so that the template writes every message, or the last at least:
        some templates leave out what was said before."""
        roles = tuple(turn.role for turn in messages_of(prompt))
        if roles not in self._listed:
            probes = [Message(role, f"{PROBE}n{number}.") for number, role in enumerate(roles)]
            reasons, written = [], {}
            for listed in LISTED:
                try:
                    text = self._apply(probes, listed)
                except TEMPLATE_ERRORS as error:
                    reasons.append(_reason(error))
                    continue
                if probes[-1].content in text and not (listed and UNREAD_PART in text):
                    written[listed] = sum(probe.content in text for probe in probes)
            if not written:
                raise self._refusal(prompt, (*reasons, "it leaves the prompt out of its text")[0])
            self._listed[roles] = max(written, key=written.__getitem__)
        return self._listed[roles]

    def _apply(self, turns: Sequence[Message], listed: frozenset[str]) -> str:
        """The text, with the opening of an answer behind a message of the user."""
        entries: list[dict[str, Any]] = [
            {"role": m.role, "content": [{"type": "text", "text": m.content}] if m.role in listed else m.content}
            for m in turns
        ]
        return str(
            self._tokenizer.apply_chat_template(
                entries, chat_template=self._template, tokenize=False, add_generation_prompt=turns[-1].role == "user"
            )
        )

    def _refusal(self, prompt: Prompt, reason: str) -> InputError:
        others = self._tokenizer.chat_template
        names = sorted(name for name in others if others[name] != self._template) if isinstance(others, dict) else []
        another = f", or name another one with --chat-template ({', '.join(map(repr, names))})" if names else ""
        return InputError(
            f"The chat template cannot render the prompt {shown(told(prompt))}: {reason}.",
            hint=f"Leave the template out with --raw{another}.",
        )


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"{type(error).__name__} of {first}" if isinstance(error, KeyError) else first

"""`sspcompile run`: try what was built."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import click

from sspcompile.cli.options import json_option, placement_in, placement_options, quiet_option, workspace

# What a terminal would obey instead of showing: C0 without tab and line feed, DEL, C1.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PROMPT_BYTES = 1 << 20


@click.command(
    short_help="Write text with an artifact or an export.",
    epilog="""\b
Examples:
  sspcompile run --prompt "What is the symbol of gold?"
  sspcompile run exported/chemistry-helpdesk-onnx --prompt "What is the symbol of gold?"
  sspcompile run --prompt "What is the symbol of gold?" --dense   (the model before the cut)
  sspcompile run artifacts/nested --size 0.8 --prompt "What is the symbol of gold?"
  sspcompile run artifacts/mine --prompt - --temperature 0.7 --top-p 0.9 < question.txt
""",
)
@click.argument("artifact", required=False)
@click.option(
    "--prompt",
    "-p",
    "prompts",
    multiple=True,
    required=True,
    metavar="TEXT",
    help="What to go on from; - reads it from stdin; may be repeated.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    metavar="N",
    help="Stop after N tokens at the latest.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    metavar="T",
    help="Take the likeliest token (0), or draw among them (above 0).",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    metavar="P",
    help="Draw among the likeliest tokens that make up this share.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, metavar="N", help="Seed of the draws."
)
@click.option("--raw", is_flag=True, help="Leave the chat template out.")
@click.option("--chat-template", metavar="NAME", help="Use this one of several chat templates.")
@click.option("--dense", is_flag=True, help="Use the model that the artifact was cut from, to compare.")
@click.option(
    "--size",
    type=float,
    metavar="SHARE",
    help="Of a nested artifact or its ONNX export: the largest size of at most this share of the parameters.",
)
@placement_options
@click.option("--trust-remote-code", is_flag=True, help="Run code that a model folder of others brings along.")
@json_option
@quiet_option
def run(
    artifact: str | None,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    raw: bool,
    chat_template: str | None,
    dense: bool,
    size: float | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Write text with ARTIFACT: a build, an export in any format, or a model folder; without it, the last build.

    Text appears as it is written; how fast goes to stderr. The chat template is used where there is one.
    """
    from sspcompile.cli.progress import stages

    texts, placement = [_read(prompt) for prompt in prompts], placement_in(given)
    with stages(quiet):
        from sspcompile.api.arguments import named
        from sspcompile.api.run import Sampling, open_model, prompt_tokens, write
        from sspcompile.model.chat import Rendering

        folder, model = open_model(
            named(artifact, workspace()),
            dense=dense,
            size=size,
            placement=placement,
            trust_remote_code=trust_remote_code,
            rendering=Rendering(chat_template, raw),
        )
    for text in texts:  # none is answered where another one cannot be
        prompt_tokens(model, text)
    sampling, texts_written = Sampling(temperature, top_p, seed), []
    for number, text in enumerate(texts):
        if len(texts) > 1 and not as_json:
            click.echo(f"{chr(10) if number else ''}> {visible(text)}")
        show: Callable[[str], None] = _silent if as_json else _show
        done = write(model, text, new_tokens=max_new_tokens, sampling=sampling, on_text=show)
        texts_written.append(done)
        if not as_json:
            click.echo()
        if done.full_context is not None:
            click.echo(
                f"Note: the text ends at {done.full_context} tokens, prompt included: the model has no more positions.",
                err=True,
            )
        if not quiet and not as_json:
            rate = f", {done.tokens_per_s:.0f} tokens/s after it" if done.tokens_per_s is not None else ""
            count = f"{len(done.tokens)} token{'s' if len(done.tokens) != 1 else ''}"
            click.echo(f"({count}, the first after {1000 * done.first_token_s:.0f} ms{rate})", err=True)
    if as_json:
        from dataclasses import asdict

        click.echo(json.dumps({"model": str(folder), "texts": [asdict(one) for one in texts_written]}))


def visible(text: str) -> str:
    """Text with control characters replaced, so that no model and no file can steer the terminal."""
    return CONTROLS.sub("\ufffd", text)


def _show(text: str) -> None:
    click.echo(visible(text), nl=False)
    sys.stdout.flush()


def _silent(_: str) -> None:
    return


def _read(prompt: str) -> str:
    from sspcompile.errors import InputError

    if prompt != "-":
        return prompt
    data = sys.stdin.buffer.read(PROMPT_BYTES + 1)
    if len(data) > PROMPT_BYTES:
        raise InputError("The prompt on stdin is longer than 1 MiB.", hint="Give a shorter one.")
    try:  # as some shells of Windows write it: with a mark in front, and line ends of two characters
        return data.decode("utf-8-sig").replace("\r\n", "\n").strip("\n")
    except UnicodeDecodeError as error:
        raise InputError("The prompt on stdin is not UTF-8 text.", hint="Convert it, or type --prompt.") from error

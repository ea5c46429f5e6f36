"""The options of a build, each written once: name, type, default and help.

From here follow the flags of the command line, the environment variables, the keys of a recipe with their JSON schema,
and the keywords of the Python API (`keywords.py`, written by `make generated`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sspcompile.request.amounts import Bytes, Losses, Parameters, Shares, Time, shares_of
from sspcompile.request.documents import NAME_PATTERN, Text
from sspcompile.request.rounding import Rounded, known_rounding

ENVIRONMENT_PREFIX = "SSPCOMPILE_"
# Leaves the choice to the build.
AUTO = "auto"
# Of a hundred next tokens at most so many are others than the dense model's, where no budget is given.
DEFAULT_MAX_LOSS = 0.05
# Beyond so many times the dense model's perplexity nothing is a model of the scenario any more.
MOST_PERPLEXITY = 100
# What --max-memory and --max-latency count where nothing else is said: as many tokens as the model has positions, no
# more than these.
DEFAULT_CONTEXT, DEFAULT_BATCH = 4096, 1
BUDGETS = (
    *("size", "keep", "strength", "max_loss", "max_perplexity", "max_params", "max_memory", "max_latency", "nested"),
)
# Budgets of heads stand alone, and so do several sizes at once; the others hold together.
ALONE = ("keep", "strength", "nested")
# Floors under what is off the scenario are no budget by themselves: they hold beside one.
LIMITS = (*BUDGETS, "protect")
# What leaves a say to units that go whole; anything else is about parts of them.
OF_WHOLE: Mapping[str, tuple[str | None, ...]] = {
    **dict.fromkeys(ALONE, (None,)),
    **{"criterion": (AUTO,), "granularity": ("head",), "importance_from": ("auto", "prompts")},
}

# What `--without` switches off, to see what it is worth: `axes` (no selection: every pool is a domain), `whitelist` (no
# head is kept by privilege), `mixing` (the top domain alone), `scenario` (all domains alike, whatever the scenario),
# `calibration` (recognition at temperature 1).
Part = Literal["axes", "whitelist", "mixing", "scenario", "calibration"]
PARTS: tuple[Part, ...] = get_args(Part)
Repairing = Literal["least-squares", "least-squares-mlp", "flap-bias", "none"]
AskedLayout = Literal["auto", "uniform", "per-layer"]
Granularity = Literal["head", "group"]
ImportanceFrom = Literal["domains", "prompts", "auto"]
Baselines = Literal["few", "all", "none"]
Units = Literal["all", "heads", "layers", "attention"]
# Units that go whole: layers, or the attention of layers.
Whole = Literal["layers", "attention"]
WHOLE_LAYOUTS: Mapping[Whole, Literal["uniform", "per-layer"]] = {"layers": "uniform", "attention": "per-layer"}
# What runs the model while --max-latency is measured: `torch` is transformers.
LatencyRuntime = Literal["torch"]
LATENCY_RUNTIME: LatencyRuntime = "torch"


@dataclass(frozen=True)
class Shown:
    """What people read of an option: `help` for all, `metavar` where its values are not a short list."""

    help: str
    metavar: str | None = None
    short: str | None = None


def _in_order(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Each part once, in the order of PARTS: equal requests are equal recipes."""
    return tuple(part for part in PARTS if part in parts)


def exclusive(names: Sequence[str]) -> str:
    """What is said of several that stand where one may."""
    return f"{' and '.join(names)} exclude each other; give one"


def clashing(names: Sequence[str]) -> bool:
    """Whether budgets, and floors beside them, among these options cannot stand together."""
    budgets = set(LIMITS) & set(names)
    return len(budgets) > 1 and bool(set(ALONE) & budgets)


class Options(BaseModel):
    """What a build works with: complete and checked. At least one of BUDGETS is a number, and none of ALONE clashes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: Annotated[
        Text | None, Shown("A model folder or a hub name; the embedded model by default.", "MODEL", "-m")
    ] = None
    revision: Annotated[
        Text | None, Shown("The branch, tag or commit of a hub name; MODEL@REV says the same.", "REV")
    ] = None
    size: Annotated[
        float | None,
        Field(gt=0, le=1, allow_inf_nan=False),
        Shown("Keep at most this share of all parameters, above 0 and up to 1, whatever it costs.", "SHARE"),
    ] = None
    keep: Annotated[
        float | None,
        Field(gt=0, le=1, allow_inf_nan=False),
        Shown("Keep at most this share of the query heads, and every channel of the MLPs, whatever it costs.", "RATIO"),
    ] = None
    strength: Annotated[
        float | None,
        Field(ge=0, le=1, allow_inf_nan=False),
        Shown(
            "In [0, 1], instead of --keep: how hard to cut, 0 keeps all; the budget follows from it and from the "
            "scenario's breadth.",
            "S",
        ),
    ] = None
    max_loss: Annotated[
        float | None,
        Field(gt=0, lt=1, allow_inf_nan=False),
        Shown(
            "Without another budget: keep as little as changes at most this share of the next tokens, by the upper end "
            "of the interval that held-out prompts give; the report has the loss on others.",
            "SHARE",
        ),
    ] = DEFAULT_MAX_LOSS
    max_perplexity: Annotated[
        float | None,
        Field(gt=1, le=MOST_PERPLEXITY, allow_inf_nan=False),
        Shown(
            "Keep as little as makes replies at most this many times as perplexing as they are to the dense model, as "
            "1.05, by the upper end of the interval that held-out prompts give: reference answers, and where there "
            "are none what the dense model would write. Beside --max-loss both hold.",
            "TIMES",
        ),
    ] = None
    protect: Annotated[
        Losses | None,
        Shown(
            "Beside the budget: let at most this share of the next tokens change on held-out prompts of DOMAIN, a "
            "pool's name, or general for all that the scenario is not about. May be repeated. Prompts of DOMAIN join "
            "the texts that choose and repair.",
            "DOMAIN=LOSS",
        ),
    ] = None
    max_params: Annotated[
        Parameters | None,
        Shown("Keep at most this many parameters, as 120M, 1.1B or 120000000: --size as a number.", "N"),
    ] = None
    max_memory: Annotated[
        Bytes | None,
        Shown(
            "Keep what takes at most this much memory, as 6GB: weights and the KV cache of --batch sequences of "
            "--context tokens, in the dtype of the checkpoint. Of several budgets all hold.",
            "SIZE",
        ),
    ] = None
    max_latency: Annotated[
        Time | None,
        Shown(
            "Keep what decodes a token in at most this time, as 35ms, where the cache holds --batch sequences of "
            "--context tokens: by a table that is measured here, on --device, in --dtype, with --threads.",
            "TIME",
        ),
    ] = None
    latency_runtime: Annotated[
        LatencyRuntime | None, Shown("What --max-latency is measured in: torch, which is transformers, by default.")
    ] = None
    context: Annotated[
        int | None,
        Field(ge=1, le=1 << 24),
        Shown(
            f"Tokens of a sequence that memory and time are counted for: by default the model's positions, "
            f"{DEFAULT_CONTEXT} at most.",
            "TOKENS",
        ),
    ] = None
    batch: Annotated[
        int | None,
        Field(ge=1, le=1 << 16),
        Shown(f"Sequences at once that memory and time are counted for: by default {DEFAULT_BATCH}.", "N"),
    ] = None
    nested: Annotated[
        Shares | None,
        Shown(
            "Write one artifact for several sizes, these shares of all parameters: each smaller model is a prefix of "
            "the larger. Whole key/value groups are cut, and counts differ by layer.",
            "SHARES",
        ),
    ] = None
    units: Annotated[
        Units,
        Shown(
            "What budgets but --keep and --strength may remove: heads and channels of the MLPs (all), heads alone, "
            "whole layers alone (layers), or the whole attention of layers alone, whose MLPs stay (attention). What "
            "goes whole is ranked by its influence on the scenario's texts."
        ),
    ] = "all"
    layout: Annotated[AskedLayout, Shown("Counts equal in every layer, or not; auto measures both.")] = "auto"
    host: Annotated[
        str,
        Field(pattern=r"^[a-z0-9_]{1,40}$"),
        Shown(
            "Stock class of a uniform cut: the model's own (auto), or mistral, seed_oss, granite where lossless.",
            "FAMILY",
        ),
    ] = AUTO
    pools: Annotated[Text | None, Shown("A folder of domain pools of your own, beside the shipped ones.", "DIR")] = None
    axes: Annotated[
        int | None,
        Field(ge=2, le=1000),
        Shown("Make N of all pools domains, chosen to be orthogonal and to cover the others.", "N"),
    ] = None
    criterion: Annotated[
        str,
        Field(pattern=NAME_PATTERN),
        Shown(
            "Score of the heads, which are then cut alone (fisher, obs, kl, ...; `sspcompile criteria` lists them); "
            "auto measures obs on texts like the scenario's, and compares the shapes that it calls for.",
            "NAME",
        ),
    ] = AUTO
    granularity: Annotated[
        Granularity, Shown("Cut single heads, or whole key/value groups, which saves more of the KV cache.")
    ] = "head"
    importance_from: Annotated[
        ImportanceFrom,
        Shown(
            "Score heads by the domains' cached importance, or on the scenario's own prompts; auto takes the prompts "
            "where there are enough of them, and both where there are few."
        ),
    ] = "auto"
    repair: Annotated[
        Repairing,
        Shown(
            "Refit what lost an input, o_proj and down_proj (least-squares), or every down_proj as well "
            "(least-squares-mlp), or add FLAP's bias where o_proj has one, and to down_proj where that has one too."
        ),
    ] = "least-squares"
    quantize: Annotated[
        Rounded | None,
        BeforeValidator(known_rounding),
        Shown(
            "Round the finished cut too, for ONNX Runtime (int8, int4) or llama.cpp (q8_0, q4_0): refit o_proj and "
            "down_proj for it, export it, and weigh it, byte by byte, against the dense model that is only rounded."
        ),
    ] = None
    baselines: Annotated[
        Baselines,
        Shown("What the report compares with: a few cheap baselines, or all (several times the passes), or none."),
    ] = "few"
    without: Annotated[
        tuple[Part, ...],
        Field(strict=False),
        AfterValidator(_in_order),
        Shown("Switch a part of the method off, to see what it is worth; may be repeated."),
    ] = ()
    chat_template: Annotated[
        Text | None, Shown("Render prompts with this one of the model's named chat templates.", "NAME")
    ] = None
    raw: Annotated[bool, Shown("Leave the chat template out: the model reads the prompts as they are.")] = False
    max_tokens: Annotated[int, Field(ge=8, le=131072), Shown("Read at most N tokens of each text.", "N")] = 512
    continuation_tokens: Annotated[
        int, Field(ge=0, le=4096), Shown("Let the dense model continue each text by N tokens.", "N")
    ] = 64
    seed: Annotated[int, Field(ge=0, lt=2**32), Shown("Seed of every random choice.", "N")] = 0

    @model_validator(mode="after")
    def _one_rendering(self) -> Options:
        if self.raw and self.chat_template is not None:
            problem = exclusive(("raw", "chat_template"))
            raise PydanticCustomError("exclusive", "{problem}", {"problem": problem})
        return self

    @model_validator(mode="before")
    @classmethod
    def _budget_replaces_default(cls, given: Any) -> Any:
        """The default of `max_loss` is not for those who gave another budget."""
        if (
            isinstance(given, Mapping)
            and "max_loss" not in given
            and any(given.get(name) is not None for name in BUDGETS)
        ):
            return {**given, "max_loss": None}
        return given

    @model_validator(mode="after")
    def _one_budget(self) -> Options:
        given = [name for name in LIMITS if getattr(self, name) is not None]
        budget = bool({*BUDGETS} & {*given})
        if not budget or clashing(given):
            problem = exclusive(given) if budget else f"one of {', '.join(BUDGETS)} is needed"
            raise PydanticCustomError("exclusive", "{problem}", {"problem": problem})
        return self

    @model_validator(mode="after")
    def _units_are_whole(self) -> Options:
        if self.whole is None:
            return self
        layout, instead = WHOLE_LAYOUTS[self.whole], "size, max_params, max_memory, max_perplexity or max_loss"
        known_of = {**OF_WHOLE, "layout": (AUTO, layout)}
        about = [f"{name} {value}" for name, known in known_of.items() if (value := getattr(self, name)) not in known]
        if self.whole == "attention" and self.layout == "uniform":
            raise ValueError("units attention leaves layers that differ, which layout uniform has not; leave it out")
        if self.whole == "attention" and self.max_latency is not None:
            raise ValueError(f"max_latency has no price of attention as a whole, with units attention; give {instead}")
        if self.repair == "flap-bias":
            raise ValueError(
                f"units {self.whole} removes what flap-bias would be written to; give repair least-squares or none"
            )
        if about:
            what = "whole layers" if self.whole == "layers" else "the whole attention of layers"
            problem = f"units {self.whole} removes {what}, and {' and '.join(about)} is about parts of them"
            instead = instead.replace(" or", ", max_latency or") if self.whole == "layers" else instead
            raise ValueError(f"{problem}; give {instead}")
        return self

    @model_validator(mode="after")
    def _one_size_is_rounded(self) -> Options:
        if self.nested is not None and self.quantize is not None:
            raise ValueError(
                "quantize rounds one cut, and nested writes several sizes; cut one out with slice --from and export it"
            )
        return self

    @property
    def whole(self) -> Whole | None:
        """What a budget removes whole; None where it removes parts of layers."""
        return self.units if self.units in ("layers", "attention") else None

    @property
    def floored(self) -> bool:
        """Whether a bound on what the scenario loses says how much goes."""
        return self.max_loss is not None or self.max_perplexity is not None

    @property
    def source(self) -> str | None:
        """The model with its revision in one word. Raises InputError for a revision of what has none."""
        from sspcompile.checkpoint.locate import at_revision

        return at_revision(self.model, self.revision)

    @property
    def wanted_host(self) -> str | None:
        """The family whose stock class is to load a uniform cut; None leaves the choice to the build."""
        return None if self.host == AUTO else self.host

    @property
    def shares(self) -> tuple[float, ...]:
        """The sizes of a nested artifact, falling from 1; nothing where one size is asked for."""
        return () if self.nested is None else shares_of(self.nested)

    def given(self) -> dict[str, Any]:
        """Every option that has a value, as plain data in the order of the definition."""
        return self.model_dump(mode="json", exclude_none=True)


NAMES: tuple[str, ...] = tuple(Options.model_fields)


def shown_of(name: str) -> Shown:
    """What people read of the option `name`."""
    return next(item for item in Options.model_fields[name].metadata if isinstance(item, Shown))


def default_of(name: str) -> Any:
    """The default of the option `name`."""
    return Options.model_fields[name].default


def flag(name: str) -> str:
    """`max_tokens` as it is typed: `--max-tokens`."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """`max_tokens` as the environment has it: `SSPCOMPILE_MAX_TOKENS`."""
    return ENVIRONMENT_PREFIX + name.upper()

"""`trim`: a model with the part of its vocabulary that a scenario reads and writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

import sspcompile
from sspcompile.api.arguments import Named
from sspcompile.api.given import number_of, whole_of
from sspcompile.api.reads import dense_reads, pool_reads
from sspcompile.checkpoint import Checkpoint, Manifest, staged, write_manifest
from sspcompile.checkpoint.replacing import refuse_existing
from sspcompile.checkpoint.settings import read_json
from sspcompile.checkpoint.source import not_carried
from sspcompile.errors import ArtifactError, CheckpointError, InputError, UnsupportedModelError
from sspcompile.export.card import CARD, licence_of, trim_card
from sspcompile.model.chat import rendering_of
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import DenseModel, open_dense
from sspcompile.model.loading import load_tokenizer
from sspcompile.model.placement import ANYWHERE, Placement, release
from sspcompile.model.text import demand_readable, sentences
from sspcompile.progress import Progress, adding, silent, stage_of
from sspcompile.request.holding import demand_held_out
from sspcompile.request.options import Options
from sspcompile.request.pools import pools_of
from sspcompile.request.prompts import Prompt, told
from sspcompile.request.request import Request
from sspcompile.request.splits import Splits, draw_splits, fit_part, split, thinned
from sspcompile.select.reading import mixture_through
from sspcompile.select.scoring import toolkit_of
from sspcompile.select.texts import Texts
from sspcompile.trimming.judging import Judged, TextCost, costs_of_texts, judged, with_answers
from sspcompile.trimming.proof import Trimmed, check_rows, check_tokenizer, compare_logits
from sspcompile.trimming.tokenizer import Bpe, read_bpe
from sspcompile.trimming.tokens import TokenLoss, TokenOrder, Use, token_order, use_of
from sspcompile.trimming.write import TABLES, mask_of, named_ids, write_trimmed
from sspcompile.workspace import TRIM, Workspace

MAX_LOSS, MAX_LOSS_OFF = 0.01, 0.05
PARTS = ("judge", "off")
# Which texts these are, in words.
PLACES = {"judge": "on the scenario", "off": "off the scenario"}
SCHEMA = 1
# Prompts of each pool that are continued: to order what the scenario never mentions, and to guard it.
FROM_POOL, GUARD_FROM_POOL = 6, 3

log = logging.getLogger("sspcompile")


@dataclass(frozen=True)
class TrimBounds:
    """How many `tokens` stay, or as few as lose at most `max_loss` on the scenario's guard texts and `max_loss_off` on
    those of all domains: of the most probable next tokens, and of the tokens that are read."""

    tokens: int | None = None
    max_loss: float = MAX_LOSS
    max_loss_off: float = MAX_LOSS_OFF

    @classmethod
    def of(cls, **given: Any) -> TrimBounds:
        """From what was given; None means "not given". Raises InputError for shares beside a number of tokens, and for
        what is no number."""
        read = {
            name: whole_of(value, name) if name == "tokens" else number_of(value, name) for name, value in given.items()
        }
        found: dict[str, Any] = {name: value for name, value in read.items() if value is not None}
        if "tokens" in found and len(found) > 1:
            raise InputError(
                "A number of tokens and a bound on the loss do not go together.", hint="Give --tokens, or --max-loss."
            )
        if not all(0 < found[name] < 1 for name in found if name != "tokens"):
            raise InputError("A bound on the loss is a share above 0 and below 1.", hint="As --max-loss 0.01.")
        return cls(**found)


@dataclass(frozen=True)
class TrimOutcome:
    """`kept` of `of` tokens stay, by their old ids. `guard` is what decided, `judged` what is reported (see PLACES)."""

    folder: Path
    dense: DenseModel
    kept: tuple[int, ...]
    of: int
    parameters: tuple[int, int]
    guard: TokenLoss
    judged: Mapping[str, Judged]
    proof: Trimmed

    def to_json(self) -> dict[str, Any]:
        """What trim.json holds."""
        return {
            "schema": SCHEMA,
            "tokens": {"dense": self.of, "trimmed": len(self.kept)},
            "parameters": {"dense": self.parameters[0], "trimmed": self.parameters[1]},
            "guard": asdict(self.guard),
            "judged": {name: asdict(one) for name, one in self.judged.items()},
            "proof": asdict(self.proof),
            "kept": list(self.kept),
        }


@dataclass(frozen=True)
class _Read:
    """What the dense model made of the texts, while it was in memory. `words`: those of PARTS, with their answers."""

    kept: tuple[int, ...]
    guard: TokenLoss
    lost: Mapping[str, TokenLoss]
    words: Mapping[str, Sequence[Prompt]]
    costs: Mapping[str, Sequence[TextCost]]


def refuse_untrimmable(dense: DenseModel) -> tuple[Bpe, frozenset[int]]:
    """The tokenizer, and the tokens that any text and any file of the model needs.

    Raises UnsupportedModelError, and CheckpointError for a configuration without weights.
    """
    checkpoint = dense.checkpoint
    if not checkpoint.has_weights:
        raise CheckpointError(
            f"{checkpoint.path} holds a configuration without weights.", hint="Name a folder with model.safetensors."
        )
    bpe = read_bpe(checkpoint.path)
    if any(number >= checkpoint.geometry.vocab for number in bpe.named):
        raise UnsupportedModelError(
            f"The tokenizer of {checkpoint.path} puts a token in front of texts that the model has no row for.",
            hint="Use the tokenizer that the model was trained with.",
        )
    needed = bpe.needed() | named_ids(checkpoint)
    return bpe, frozenset(number for number in needed if number < checkpoint.geometry.vocab)


def trim(
    request: Request,
    dense: DenseModel,
    out: Path,
    workspace: Workspace,
    progress: Progress = silent,
    *,
    bounds: TrimBounds = TrimBounds(),
    overwrite: bool = False,
    placement: Placement = ANYWHERE,
) -> TrimOutcome:
    """Read the scenario, choose tokens, write the model without the others, prove and judge it. Whole or absent.

    Raises BudgetError for fewer tokens than any text needs, and what `refuse_untrimmable` and `demand_held_out` raise.
    """
    reads = (*dense_reads(dense), *pool_reads(request.options))
    refuse_existing(out, overwrite=overwrite, reads=reads)
    if "max_loss" in request.outside and bounds.tokens is None and bounds.max_loss == MAX_LOSS:
        log.info(
            f"{request.outside['max_loss']} is about builds, where it bounds the next tokens that a cut changes. trim "
            f"keeps what it loses within {MAX_LOSS:g}; --max-loss says another bound."
        )
    bpe, needed = refuse_untrimmable(dense)
    demand_held_out(request.scenario, request.options)
    checkpoint = dense.checkpoint
    loaded = dense.load(placement=placement, rendering=rendering_of(request.options))
    demand_readable(loaded, request.scenario.prompts, request.options.max_tokens)
    needed |= {number for number in bpe.unnamed(loaded.tokenizer.get_vocab()) if number < loaded.vocab}
    found = _read(request, dense, loaded, workspace, bpe, needed, progress, bounds)
    del loaded  # the written model takes as much memory again
    release()
    with staged(out, overwrite=overwrite, reads=reads) as folder:
        rows = len(found.kept) / checkpoint.geometry.vocab
        sizes = [int(info.nbytes * (rows if name in TABLES else 1)) for name, info in checkpoint.tensors.items()]
        write_trimmed(checkpoint, bpe, found.kept, folder, adding(progress, "cutting", sum(sizes)))
        texts = [told(prompt) for part in PARTS for prompt in found.words[part]]
        outcome = _judged(request.options, dense, folder, out, found, texts, progress, placement)
        _describe(folder, outcome)
    return outcome


def _read(
    request: Request,
    dense: DenseModel,
    loaded: LoadedModel,
    workspace: Workspace,
    bpe: Bpe,
    needed: frozenset[int],
    progress: Progress,
    bounds: TrimBounds,
) -> _Read:
    """Everything that the dense model is needed for: which tokens stay, and what it makes of the texts."""
    options = request.options
    splits = _splits(request, dense, loaded, workspace, progress)
    texts = Texts(loaded, options)
    texts.continued(splits.every, stage_of(progress, "continuations"))
    uses: dict[str, Use] = {}
    parts: dict[str, Sequence[Prompt]] = {"fit": splits.fit, "guard": splits.guard, "judge": splits.judge}
    parts["off"] = splits.off
    parts["general"], parts["general guard"] = _general(options)
    for name, prompts in parts.items():
        uses[name] = use_of(loaded, texts.continued(prompts), stage_of(progress, f"tokens ({name})"))
    general = replace(uses["general"], read=uses["general"].read + _read_in_pools(loaded, options))
    order = token_order(bpe, uses["fit"], general, needed)
    kept = _chosen(order, uses, bounds)
    mask = mask_of(kept, loaded.vocab)
    words = {name: with_answers(loaded, parts[name], texts.continued(parts[name])) for name in PARTS}
    return _Read(
        kept=kept,
        guard=uses["guard"].loss(mask),
        lost={name: uses[name].loss(mask) for name in PARTS},
        words=words,
        costs={name: costs_of_texts(loaded, prompts, options.max_tokens) for name, prompts in words.items()},
    )


def _splits(
    request: Request, dense: DenseModel, loaded: LoadedModel, workspace: Workspace, progress: Progress
) -> Splits:
    """The texts of a build of this scenario."""
    toolkit = toolkit_of(request, dense, loaded, workspace, progress)
    mixture = mixture_through(request, toolkit, loaded)
    pools = pools_of(request.options).named(mixture.domains)
    return draw_splits(request.scenario.prompts, mixture.parts, pools, request.options.seed)


def _general(options: Options) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Prompts of all pools, as many of each: some that choose, and some that guard."""
    parts = [split(pool.prompts)[:2] for pool in pools_of(options).every]
    chosen = chain.from_iterable(thinned(fit, FROM_POOL) for fit, _ in parts)
    guard = chain.from_iterable(thinned(guard, GUARD_FROM_POOL) for _, guard in parts)
    return tuple(chosen), tuple(guard)


def _read_in_pools(loaded: LoadedModel, options: Options) -> np.ndarray:
    """How often each token stands in the pools' prompts that may choose, [V]."""
    prompts = [prompt for pool in fit_part(pools_of(options).every) for prompt in pool.prompts]
    items = sentences(loaded.tokenizer, prompts, options.max_tokens, loaded.rendering)
    ids = [token for item in items for token in item.ids]
    return np.bincount(np.array(ids, dtype=np.int64), minlength=loaded.vocab)[: loaded.vocab].astype(float)


def _chosen(order: TokenOrder, uses: Mapping[str, Use], bounds: TrimBounds) -> tuple[int, ...]:
    if bounds.tokens is not None:
        count = order.demand(bounds.tokens)
    else:
        guards = ((uses["guard"], bounds.max_loss), (uses["general guard"], bounds.max_loss_off))
        count = max(order.within(use, bound) for use, bound in guards)
    return tuple(np.nonzero(order.first(count))[0].tolist())


def _judged(
    options: Options,
    dense: DenseModel,
    folder: Path,
    out: Path,
    found: _Read,
    texts: Sequence[str],
    progress: Progress,
    placement: Placement,
) -> TrimOutcome:
    """Prove what was written, and judge it on held-out texts."""
    checkpoint, written = dense.checkpoint, Checkpoint(folder)
    tensors = check_rows(checkpoint, written, found.kept, stage_of(progress, "comparing weights"))
    same, of = check_tokenizer(load_tokenizer(checkpoint.path), folder, found.kept, texts)
    parity = compare_logits(checkpoint, folder, found.kept, stage_of(progress, "proving"), placement=placement)
    progress("judging", 0, 1)
    release()  # the models that were compared
    loaded = open_dense(str(folder)).load(placement=placement, rendering=rendering_of(options))
    told = {
        name: judged(
            found.lost[name],
            found.costs[name],
            costs_of_texts(loaded, found.words[name], options.max_tokens),
            seed=options.seed,
        )
        for name in PARTS
    }
    progress("judging", 1, 1)
    sizes = [sum(int(np.prod(info.shape)) for info in one.tensors.values()) for one in (checkpoint, written)]
    return TrimOutcome(
        folder=out,
        dense=dense,
        kept=found.kept,
        of=checkpoint.geometry.vocab,
        parameters=(sizes[0], sizes[1]),
        guard=found.guard,
        judged={name: one for name, one in told.items() if one.texts},
        proof=Trimmed(tensors, same, of, parity),
    )


def _describe(folder: Path, outcome: TrimOutcome) -> None:
    """What is beside the model: trim.json, the card, and last the manifest over everything."""
    path = outcome.dense.checkpoint.path
    origin = {
        "sspcompile": sspcompile.__version__,
        **outcome.dense.origin,
        "licence": licence_of(path),
        "left_out": not_carried(path),
    }
    (folder / TRIM).write_text(json.dumps(outcome.to_json()) + "\n", "utf-8")
    (folder / CARD).write_text(trim_card(outcome.to_json(), PLACES, origin, outcome.folder.name), "utf-8")
    write_manifest(folder, origin)


def verify_trimmed(
    found: Named, dense: DenseModel, progress: Progress = silent, *, placement: Placement = ANYWHERE
) -> tuple[Manifest, Trimmed]:
    """Prove a folder that `trim` wrote again. Raises ParityError, and ArtifactError for a damaged trim.json."""
    manifest = found.manifest()
    kept = read_json(found.folder / TRIM).get("kept")
    vocab = dense.checkpoint.geometry.vocab
    if not isinstance(kept, list) or not all(type(one) is int and 0 <= one < vocab for one in kept) or not kept:
        raise ArtifactError(f"{found.folder / TRIM} does not say which tokens stayed.", hint="Trim the model again.")
    tensors = check_rows(dense.checkpoint, Checkpoint(found.folder), kept, stage_of(progress, "comparing weights"))
    texts = [prompt for pool in pools_of(Options()).every for prompt in pool.prompts]
    same, of = check_tokenizer(load_tokenizer(dense.checkpoint.path), found.folder, kept, texts)
    proving = stage_of(progress, "proving")
    parity = compare_logits(dense.checkpoint, found.folder, kept, proving, placement=placement)
    return manifest, Trimmed(tensors, same, of, parity)

"""The stages in order, each a value: Scenario -> Toolkit -> HeadMask -> SlicePlan -> files -> proof -> report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sspcompile import prepare as preparing
from sspcompile.checkpoint import Checkpoint, fingerprint, locate
from sspcompile.checkpoint.locate import EMBEDDED
from sspcompile.compile.budget import keep_from_strength, merit
from sspcompile.compile.layouts import Choice, choose
from sspcompile.compile.mask import HeadMask, Layout, kept_of
from sspcompile.compile.mixture import Mixture, ablated, given_mixture, mixture_of
from sspcompile.criteria import key_of, of_key
from sspcompile.domains import pools_fingerprint
from sspcompile.errors import ToolkitError, UnsupportedModelError
from sspcompile.loaded import LoadedModel, load
from sspcompile.pipeline.evidence import Evidence, fit_part, gather
from sspcompile.pipeline.pools import PoolSet, pools_of, pools_suffix
from sspcompile.pipeline.scoring import HeadScores, score_heads
from sspcompile.prepare import parallel
from sspcompile.prepare.stages import Stages, beside
from sspcompile.prepare.text import TEXT_VERSION
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.recipe import AUTO, DEFAULTS, Recipe
from sspcompile.scenario import Scenario
from sspcompile.slicing.plan import host_of
from sspcompile.workspace import Workspace

Progress = Callable[[str, int, int], None]

# Always measured, so that no figure depends on what was prepared before: the first finds the whitelist, and every
# report shows both.
STANDARD_CRITERIA = ("fisher", "subspace")
# What ranks heads where nobody says otherwise: the best at every budget per-layer among those that cost a few passes.
AUTO_CRITERION = "fisher-rounds"


@dataclass(frozen=True)
class Subject:
    """The dense model of a build: its files and, once somebody asks for it, the model in memory."""

    checkpoint: Checkpoint
    fingerprint: str
    name: str

    @property
    def place(self) -> str:
        """Where to find it again from any folder: a hub name, `embedded`, or an absolute path."""
        typed = Path(self.name).expanduser()
        return str(typed.absolute()) if typed.is_dir() and self.name != EMBEDDED else self.name

    def load(
        self, *, device: str = "cpu", device_map: str | None = None, trust_remote_code: bool = False
    ) -> LoadedModel:
        return load(
            self.checkpoint.path,
            fingerprint=self.fingerprint,
            device=device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )


@dataclass(frozen=True)
class Ranking:
    """Scores [layers, heads] of the criterion `name`; only their order matters."""

    name: str
    values: np.ndarray


@dataclass(frozen=True)
class Compiled:
    """A scenario read through a toolkit: what it is made of and what every head is worth to it.

    `mixture` is what was measured; `used` is what scored the heads, and differs only where a part of the method is
    switched off (`without`). `merit` is [layers, heads], `whitelist` bool [layers, heads]. `repair` was asked for.
    """

    scenario: Scenario
    mixture: Mixture
    used: Mixture
    scores: HeadScores
    whitelist: np.ndarray
    merit: np.ndarray
    keep: float
    criterion: str
    groups_only: bool
    without: tuple[str, ...]
    repair: str


def open_subject(model: str | None) -> Subject:
    """Find and check the dense checkpoint; reads headers, and small weights for the fingerprint."""
    checkpoint = Checkpoint(locate(model))
    if checkpoint.has_weights:
        checkpoint.tensors  # noqa: B018 (validates headers before anything heavy starts)
    return Subject(checkpoint, fingerprint(checkpoint), model or EMBEDDED)


def toolkit_for(
    subject: Subject,
    loaded: LoadedModel,
    options: Recipe,
    workspace: Workspace,
    progress: Progress,
    criteria: Sequence[str],
) -> tuple[Toolkit, bool]:
    """The model's toolkit with STANDARD_CRITERIA and `criteria` in it, and whether it was prepared just now.

    A toolkit that was learned from an earlier content of the shipped pools is made anew. Raises InputError like
    `pools_of`.
    """
    for key in criteria:
        of_key(key)
    criteria = tuple(dict.fromkeys((*STANDARD_CRITERIA, *criteria)))
    folder = toolkit_folder(subject, options, workspace)
    given = pools_of(options)
    candidates = fit_part(given.candidates)
    toolkit = _stored(folder, subject, options, given)
    fresh = toolkit is None
    stages = Stages(loaded, beside(folder))
    if toolkit is None:
        toolkit = preparing.prepare(
            loaded,
            candidates,
            given.outside,
            axes=given.axes,
            criteria=criteria,
            seed=options.seed or 0,
            max_tokens=options.max_tokens or 0,
            continuation_tokens=options.continuation_tokens or 0,
            stages=stages,
            progress=progress,
        )
    missing = [name for name in criteria if name not in toolkit.importance]
    for name in missing:
        chosen = fit_part(given.named(toolkit.domains))
        mean, spread = preparing.importance_by_domain(stages, toolkit, chosen, name, progress)
        toolkit = preparing.with_importance(toolkit, name, mean, spread)
    # Under torchrun all processes have learned the same.
    if (fresh or missing) and parallel.current().first:
        preparing.save(toolkit, folder)
        stages.finish()
    return toolkit, fresh


def toolkit_folder(subject: Subject, options: Recipe, workspace: Workspace) -> Path:
    """Where the toolkit lies. Other than default pools, axes or settings have folders of their own; none displaces
    another."""
    settings = {name: getattr(options, name) for name in ("max_tokens", "continuation_tokens", "seed")}
    suffix = "".join(f"-{name[:3]}{value}" for name, value in settings.items() if value != DEFAULTS[name])
    return workspace.toolkit(subject.fingerprint + pools_suffix(options) + suffix)


def _stored(folder: Path, subject: Subject, options: Recipe, given: PoolSet) -> Toolkit | None:
    """The saved toolkit when it was learned from these pools with these settings; None when there is none.

    Raises ToolkitError when the folder holds one that is damaged or of another model.
    """
    if not folder.exists() or preparing.is_outdated(folder):
        return None
    toolkit = preparing.load(folder, fingerprint=subject.fingerprint)
    wanted = {
        "candidates_fingerprint": pools_fingerprint(fit_part(given.candidates)),
        "axes_asked": given.axes,
        "given_outside_fingerprint": pools_fingerprint(given.outside),
        "text_version": TEXT_VERSION,
        "seed": options.seed,
        "max_tokens": options.max_tokens,
        "continuation_tokens": options.continuation_tokens,
    }
    return toolkit if all(toolkit.meta.get(key) == value for key, value in wanted.items()) else None


def score_key(options: Recipe) -> str:
    """The name under which the toolkit caches the scores that a build asks for."""
    name = AUTO_CRITERION if options.criterion in (None, AUTO) else options.criterion
    return key_of(name, options.granularity or "head")


def compile_scenario(
    scenario: Scenario, options: Recipe, toolkit: Toolkit, loaded: LoadedModel, progress: Progress | None = None
) -> Compiled:
    """Read a scenario through the toolkit: one forward pass over its text, then arithmetic.

    Where the scenario's own prompts score heads too (`importance_from`), the passes of the criterion come on top.
    """
    name = score_key(options)
    if name not in toolkit.importance:
        raise ToolkitError(
            f"The toolkit has no {name} importance.", hint=f"Run `sspcompile prepare --criterion {name}`."
        )
    without = options.without or ()
    mixture = _mixture(scenario, options, toolkit, loaded)
    used = ablated(mixture, without)
    scores = score_heads(scenario, used, options, toolkit, loaded, name, progress)
    whitelist = toolkit.whitelist & ("whitelist" not in without)
    keep = options.keep if options.keep is not None else keep_from_strength(options.strength or 0.0, mixture.breadth)
    return Compiled(
        scenario=scenario,
        mixture=mixture,
        used=used,
        scores=scores,
        whitelist=whitelist,
        merit=merit(scores.values, whitelist),
        keep=keep,
        criterion=name,
        groups_only=options.granularity == "group",
        without=without,
        repair=options.repair or "none",
    )


def _mixture(scenario: Scenario, options: Recipe, toolkit: Toolkit, loaded: LoadedModel) -> Mixture:
    if scenario.domains is not None:
        return given_mixture(toolkit, scenario.domains, source=scenario.name)
    texts = scenario.prompts or (scenario.text or "",)
    found = preparing.features(loaded, texts, options.max_tokens or 0)
    return mixture_of(toolkit, found, calibrated="calibration" not in (options.without or ()))


def mask_of(
    compiled: Compiled, subject: Subject, choice: Choice, layout: Layout, ranking: Ranking | None = None
) -> HeadMask:
    """The mask as a value that can be saved; whitelisted heads are those which the choice kept.

    `ranking` is what the heads were chosen by, where it was not the scenario's own.
    """
    chosen_by = ranking or Ranking(compiled.criterion, compiled.scores.values)
    g = subject.checkpoint.geometry
    kept = np.argwhere(compiled.whitelist & choice.kept)
    return HeadMask(
        model=subject.fingerprint,
        layers=g.layers,
        heads=g.heads,
        kv_heads=g.kv_heads,
        kept=kept_of(choice.kept),
        layout=layout,
        keep_requested=compiled.keep,
        keep_achieved=choice.ratio,
        scores=tuple(tuple(float(f"{score:.6g}") for score in row) for row in chosen_by.values),
        whitelist=tuple((int(layer), int(head)) for layer, head in kept),
        criterion=chosen_by.name,
        scenario={
            "name": compiled.scenario.name,
            "source": compiled.scenario.source,
            **compiled.mixture.as_mapping(),
            "importance": compiled.scores.as_mapping(),
            "without": list(compiled.without),
            "repair": compiled.repair,
        },
    )


def choices_for(
    compiled: Compiled, subject: Subject, layout: str, *, host: str | None = None
) -> Mapping[Layout, Choice]:
    """One choice per layout that is asked for. `auto` asks for both and leaves out one that no class can hold.

    A `host` is wished for uniform cuts only, so with it `auto` asks for that one. Raises BudgetError,
    UnsupportedModelError when nothing is left, and InputError for a host that cannot hold the choice.
    """
    g = subject.checkpoint.geometry
    asked: tuple[Layout, ...] = (layout,)  # type: ignore[assignment]
    if layout == "auto":
        asked = ("uniform", "per-layer") if host is None else ("uniform",)
    found: dict[Layout, Choice] = {}
    for name in asked:
        choice = choose(compiled.merit, g.kv_heads, compiled.keep, name, groups_only=compiled.groups_only)
        try:
            host_of(g, choice.shapes, host)
        except UnsupportedModelError:
            if name == asked[-1] and not found:
                raise
            continue
        found[name] = choice
    return found


def evidence_for(compiled: Compiled, options: Recipe) -> Evidence:
    """The texts of this build, drawn from the scenario and the pools."""
    pools = pools_of(options).named(compiled.mixture.domains)
    return gather(compiled.scenario.prompts, compiled.mixture, pools, options.seed or 0)

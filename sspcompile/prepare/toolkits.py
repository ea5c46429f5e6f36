"""The toolkit of a model: found where an earlier build left it, or learned now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sspcompile import prepare as preparing
from sspcompile.criteria import of_key
from sspcompile.model import parallel
from sspcompile.model.chat import rendering_of, template_digest
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import DenseModel
from sspcompile.model.text import TEXT_VERSION
from sspcompile.prepare.stages import Stages, beside
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.progress import Progress
from sspcompile.request.domains import pools_fingerprint
from sspcompile.request.options import AUTO, Options, default_of
from sspcompile.request.pools import pools_of, pools_suffix
from sspcompile.request.scenario import Scenario
from sspcompile.request.splits import fit_part
from sspcompile.workspace import Workspace


def toolkit_for(
    dense: DenseModel,
    loaded: LoadedModel,
    options: Options,
    workspace: Workspace,
    progress: Progress,
    criteria: Sequence[str],
    *,
    scenario: Scenario | None = None,
) -> tuple[Toolkit, bool]:
    """The model's toolkit with the scores `criteria` in it, and whether it was prepared just now.

    For a `scenario` that says itself what it is about nothing is learned that nobody asks for (`is_stated`).

    A toolkit that was learned from an earlier content of the shipped pools, or with another chat template, is made
    anew. Without `criteria` the pools are read once, to tell domains apart. Raises InputError like `pools_of` and
    `template_of`.
    """
    for key in criteria:
        of_key(key)
    if scenario is not None and is_stated(scenario, options, criteria):
        return preparing.unlearned(loaded, pools_of(options).candidates), True
    folder = toolkit_folder(dense, options, workspace)
    given = pools_of(options)
    candidates = fit_part(given.candidates)
    toolkit = stored_toolkit(dense, options, workspace, template_digest(loaded.tokenizer, loaded.rendering))
    fresh = toolkit is None
    stages = Stages(loaded, beside(folder))
    if toolkit is None:
        toolkit = preparing.prepare(
            loaded,
            candidates,
            given.outside,
            axes=given.axes,
            criteria=(),
            seed=options.seed,
            max_tokens=options.max_tokens,
            continuation_tokens=options.continuation_tokens,
            stages=stages,
            progress=progress,
        )
    chosen, before = fit_part(given.named(toolkit.domains)), toolkit
    for name in dict.fromkeys(criteria):
        if name not in toolkit.importance:
            toolkit = preparing.with_scores(stages, toolkit, chosen, name, progress)
    # The scenario's own prompts may be all that this criterion scores; its directions come from the pools all the same.
    if asks_directions(options):
        toolkit = preparing.with_directions(stages, toolkit, chosen, progress)
    # Under torchrun all processes have learned the same.
    if (fresh or toolkit is not before) and parallel.current().first:
        preparing.save(toolkit, folder)
        stages.finish()
    return toolkit, fresh


def is_stated(scenario: Scenario, options: Options, criteria: Sequence[str]) -> bool:
    """Whether a build needs nothing of the pools but their names: the recipe gives the scenario's domains, and neither
    cached scores nor a choice of axes are asked for. Whether a toolkit lies there already makes no difference to it.
    """
    return scenario.domains is not None and not criteria and options.axes is None and not asks_directions(options)


def asks_directions(options: Options) -> bool:
    """Whether the criterion that is asked for reads the domains' probe directions."""
    return options.criterion != AUTO and of_key(options.criterion)[0].per_axis


def toolkit_folder(dense: DenseModel, options: Options, workspace: Workspace) -> Path:
    """Where the toolkit lies. Other than default pools, axes, settings or renderings have folders of their own; none
    displaces another."""
    settings = {name: getattr(options, name) for name in ("max_tokens", "continuation_tokens", "seed")}
    suffix = "".join(f"-{name[:3]}{value}" for name, value in settings.items() if value != default_of(name))
    return workspace.toolkit(dense.fingerprint + pools_suffix(options) + suffix + rendering_of(options).suffix)


def stored_toolkit(dense: DenseModel, options: Options, workspace: Workspace, template: str) -> Toolkit | None:
    """The saved toolkit when it was learned from these pools with these settings; None when there is none.

    `template` is the digest of the chat template that texts are rendered with.

    Raises ToolkitError when the folder holds one that is damaged or of another model.
    """
    folder, given = toolkit_folder(dense, options, workspace), pools_of(options)
    if not folder.exists() or preparing.is_outdated(folder):
        return None
    toolkit = preparing.load(folder, fingerprint=dense.fingerprint)
    wanted = {
        "candidates_fingerprint": pools_fingerprint(fit_part(given.candidates)),
        "axes_asked": given.axes,
        "given_outside_fingerprint": pools_fingerprint(given.outside),
        "text_version": TEXT_VERSION,
        "chat_template": template,
        "seed": options.seed,
        "max_tokens": options.max_tokens,
        "continuation_tokens": options.continuation_tokens,
    }
    return toolkit if all(toolkit.meta.get(key) == value for key, value in wanted.items()) else None

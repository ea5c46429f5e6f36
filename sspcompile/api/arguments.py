"""What an argument names: a build, a cut, an export or a model folder. Every command asks here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sspcompile.checkpoint import Manifest, check_manifest, locate
from sspcompile.checkpoint.foreign import other_format
from sspcompile.checkpoint.gguf import is_gguf as is_gguf_file
from sspcompile.checkpoint.locate import is_hub_name, model_folder, read_paths
from sspcompile.checkpoint.manifest import NAME as MANIFEST
from sspcompile.embedded import EMBEDDED
from sspcompile.errors import ArtifactError, InputError
from sspcompile.model.chat import PLAIN, Rendering, rendering_of
from sspcompile.model.context import shortest_context
from sspcompile.model.dense import DenseModel, open_dense
from sspcompile.model.llama_session import MODEL as GGUF_MODEL
from sspcompile.model.llama_session import is_gguf
from sspcompile.model.onnx_session import is_onnx
from sspcompile.model.placement import ANYWHERE, Placement
from sspcompile.model.vocabulary import same_tokens
from sspcompile.request.request import built_request
from sspcompile.slicing.configuration import MODELING_FILE, ships_code
from sspcompile.workspace import MASK, MODEL, NESTED, RECIPE, TRIM, Workspace

if TYPE_CHECKING:
    from sspcompile.model.decoder import LanguageModel, LoadedModel

Kind = Literal["build", "nested", "cut", "trimmed", "export", "model"]
KINDS: dict[Kind, str] = {
    "build": "a build",
    "nested": "a nested artifact, which holds several sizes",
    "cut": "a cut that `sspcompile slice` wrote",
    "trimmed": "a model that `sspcompile trim` wrote",
    "export": "an export",
    "model": "a model folder",
}

# Everything that holds one model.
ONE_SIZE: tuple[Kind, ...] = ("build", "cut", "trimmed", "export", "model")


@dataclass(frozen=True)
class Named:
    """What an argument names. `folder` was named; `model` is the folder in it that a runtime loads.

    `typed`: the argument, where the folder is only what it was found as.
    """

    kind: Kind
    folder: Path
    model: Path
    typed: str | None = None

    @property
    def name(self) -> str:
        if self.typed is not None and is_gguf_file(file := Path(self.typed).expanduser()):
            return file.stem
        if self.typed is not None and is_hub_name(self.typed):
            return self.typed.partition("@")[0].partition("/")[2]
        return self.folder.resolve().name

    @property
    def reads(self) -> tuple[Path, ...]:
        """What a command that takes it reads: its folder, and what that was made of."""
        return (self.folder, *(read_paths(self.typed) if self.typed is not None else ()))

    @property
    def onnx(self) -> bool:
        """Whether ONNX Runtime loads it, rather than transformers."""
        return is_onnx(self.model)

    @property
    def gguf(self) -> bool:
        """Whether llama.cpp loads it."""
        return is_gguf(self.model)

    @property
    def other_runtime(self) -> str | None:
        """What kind of export it is, in words, where something else than transformers loads it."""
        return "an ONNX export" if self.onnx else "a GGUF export" if self.gguf else None

    @property
    def custom_code(self) -> bool:
        """Whether it loads with the class that this version of sspcompile ships. Raises ArtifactError for an altered
        one; what a plain model folder brings along is not ours."""
        if self.kind in ("model", "trimmed") and not (self.model / MODELING_FILE).is_file():
            return False
        return ships_code(self.model)

    def manifest(self) -> Manifest:
        """The manifest, held against the files. Raises ArtifactError."""
        return check_manifest(self.folder)

    def dense(self, given: str | None = None, *, option: str = "--model") -> DenseModel:
        """The model that it was cut or exported from: at `given`, which the command calls `option`, or where it was.

        Raises ArtifactError for another model than that, and InputError where nothing says which one it was.
        """
        if self.kind == "model":
            if given is None:
                raise InputError(
                    f"{self.folder} does not say what it was cut from.", hint=f"Name the dense model with {option}."
                )
            return open_dense(given)
        return dense_of(self.folder, self.manifest(), given, option=option)


@dataclass(frozen=True)
class CutModel:
    """A finished model and the dense one behind it: what `eval` and `bench` compare."""

    found: Named
    dense: DenseModel
    rendering: Rendering = PLAIN
    placement: Placement = ANYWHERE

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def build(self) -> Path | None:
        """The artifact's folder; None for anything but a build."""
        return self.found.folder if self.found.kind == "build" else None

    @property
    def positions(self) -> int | None:
        """The longest text that both models can read, in tokens; None where neither says."""
        return shortest_context([self.dense.checkpoint.path, self.found.model])

    def load(self) -> tuple[LoadedModel, LanguageModel]:
        """Both in memory, the dense one first.

        Raises InputError when their tokenizers differ, because their tokens could not be compared, and for an export
        that cannot score a text.
        """
        if self.found.kind == "trimmed":
            raise InputError(
                f"{self.found.folder} has other tokens than {self.dense.name}, so next tokens cannot be compared.",
                hint=f"What it lost was measured when it was written: {self.found.folder / TRIM}.",
            )
        from sspcompile.model.llama_text import load_gguf
        from sspcompile.model.loading import load_cut
        from sspcompile.model.onnx_text import load_onnx

        cut: LanguageModel
        if self.found.onnx:
            export = load_onnx(self.found.model, placement=self.placement, rendering=self.rendering)
            export.session.demand_all_logits()
            cut = export
        elif self.found.gguf:
            cut = load_gguf(self.found.model, placement=self.placement, rendering=self.rendering, scoring=True)
        else:
            cut = load_cut(
                self.found.model,
                placement=self.placement.half(),
                trust_remote_code=self.found.custom_code,
                rendering=self.rendering,
            )
        dense = self.dense.load(placement=self.placement, rendering=self.rendering)
        if dense.vocab != cut.vocab or not same_tokens(dense.tokenizer, cut.tokenizer, dense.vocab):
            raise InputError(
                f"{self.found.model} and {self.dense.name} have different tokenizers.",
                hint="Compare a model with the one that it was cut from.",
            )
        return dense, cut


def cut_model(
    argument: str | None,
    dense: str | None,
    workspace: Workspace,
    *,
    option: str,
    command: str = "eval",
    rendering: Rendering | None = None,
    placement: Placement = ANYWHERE,
) -> CutModel:
    """What an argument of `command` names, with the model behind it: at `dense`, called `option`, or where it was.

    Without a `rendering`, prompts become text as they did in the build. Raises what `named` and `Named.dense` raise.
    """
    found = named(argument, workspace)
    return with_dense(found, dense, option=option, command=command, rendering=rendering, placement=placement)


def with_dense(
    found: Named,
    dense: str | None,
    *,
    option: str = "--model",
    command: str = "eval",
    rendering: Rendering | None = None,
    placement: Placement = ANYWHERE,
) -> CutModel:
    """As `cut_model`, for what was found already. Raises InputError for a nested artifact."""
    demand(found, *ONE_SIZE, command=command)
    if rendering is None:
        built = found.kind == "build"
        rendering = rendering_of(built_request(found.folder / RECIPE).options) if built else PLAIN
    return CutModel(found, found.dense(dense, option=option), rendering, placement)


def named(argument: str | None, workspace: Workspace) -> Named:
    """What an argument names: a folder, a build by its name, a hub name, `embedded`, a GGUF file; None names the last
    build. The file of a GGUF export stands for the export, any other for the folder that `open_dense` makes of it.

    Raises ArtifactError for what is none of these, CheckpointError for a hub name that cannot be fetched, and what
    `open_dense` raises for a GGUF file.
    """
    if argument is None:
        return _recognised(workspace.last()) or _refuse(str(workspace.last()))
    places = (Path(argument).expanduser(), workspace.artifact(argument))
    if is_gguf_file(places[0]):
        folder = places[0].parent
        if places[0].name == GGUF_MODEL and is_gguf(folder) and (folder / MANIFEST).is_file():
            return Named("export", folder, folder)
        folder = open_dense(argument).checkpoint.path
        return Named("model", folder, folder, argument)
    found = next((one for place in places if (one := _recognised(place)) is not None), None)
    if found is not None:
        return found
    ours = places[0].absolute().parent in (workspace.artifacts.absolute(), workspace.exported.absolute())
    if argument == EMBEDDED or (is_hub_name(argument) and not places[0].exists() and not ours):
        folder = locate(argument)
        return Named("model", folder, folder, argument)
    return _refuse(argument)


def _recognised(folder: Path) -> Named | None:
    if (folder / MODEL / NESTED).is_file():
        return Named("nested", folder, folder / MODEL)
    if (folder / MASK).is_file() and (folder / MODEL / "config.json").is_file():
        return Named("build", folder, folder / MODEL)
    if is_onnx(folder) or is_gguf(folder):
        return Named("export", folder, folder)
    folder = model_folder(folder)
    if not (folder / "config.json").is_file():
        return None
    if (folder / MASK).is_file():
        return Named("cut", folder, folder)
    if (folder / TRIM).is_file():
        return Named("trimmed", folder, folder)
    return Named("export" if (folder / MANIFEST).is_file() else "model", folder, folder)


def _refuse(argument: str) -> Named:
    foreign = other_format(Path(argument).expanduser(), argument)
    raise foreign or ArtifactError(
        f"{argument} is neither a build, a cut, an export nor a model folder.",
        hint="Name what `build`, `slice`, `trim` or `export` wrote, or a folder with config.json and weights.",
    )


def demand(found: Named, *kinds: Kind, command: str) -> Named:
    """`found`, if `command` takes what it is. Raises InputError that says what it is and what would be taken."""
    if found.kind in kinds:
        return found
    hint = f"It takes {', or '.join(KINDS[kind] for kind in kinds)}."
    if found.kind == "nested" and "cut" in kinds:
        hint = f"Cut one out of it, `sspcompile slice --from {found.folder} --size 0.8 --out DIR`, and name DIR."
    elif found.kind == "nested":
        hint = f"{hint} Of its sizes `sspcompile inspect {found.folder}` shows what each costs."
    raise InputError(f"{found.folder} is {KINDS[found.kind]}, and `sspcompile {command}` does not take it.", hint=hint)


def demand_transformers(found: Named, what: str) -> Named:
    """`found`, if transformers loads it. Raises InputError that says that `what` needs that."""
    if found.other_runtime is not None:
        raise InputError(
            f"{found.folder} is {found.other_runtime}, and {what} runs models in transformers.",
            hint="Name what it was exported from.",
        )
    return found


def dense_of(folder: Path, manifest: Manifest, given: str | None, *, option: str = "--model") -> DenseModel:
    """The dense model behind a finished folder: at `given`, or where its manifest says. Raises ArtifactError."""
    source, place, revision = (manifest.origin.get(f"source{key}") for key in ("", "_name", "_revision"))
    if given is None and not isinstance(place, str):
        raise ArtifactError(
            f"The manifest of {folder} does not name the model behind it.", hint=f"Name that model with {option}."
        )
    was = f"{place}@{revision}" if isinstance(revision, str) else str(place)
    dense = open_dense(given or was)
    if isinstance(source, str) and dense.fingerprint != source:
        raise ArtifactError(
            f"{dense.name} is not the model that {folder} was made from.", hint=f"Name that model with {option}."
        )
    return dense

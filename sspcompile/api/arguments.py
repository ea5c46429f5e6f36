"""What `eval` compares: a finished model folder and the dense model that it was cut from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sspcompile.api.verifying import dense_of
from sspcompile.checkpoint.manifest import NAME as MANIFEST
from sspcompile.checkpoint.manifest import check_manifest
from sspcompile.errors import InputError
from sspcompile.model.decoder import LoadedModel, TextModel
from sspcompile.model.dense import DenseModel, open_dense
from sspcompile.model.loading import load_cut
from sspcompile.model.onnx_text import OnnxText, is_onnx, load_onnx
from sspcompile.model.vocabulary import same_tokens
from sspcompile.slicing.configuration import ships_code
from sspcompile.workspace import MASK, MODEL, Workspace


@dataclass(frozen=True)
class Contenders:
    """`artifact` is the folder with mask and recipe, None for an exported or a plain model folder."""

    name: str
    model: Path
    custom_code: bool
    artifact: Path | None
    dense: DenseModel

    @property
    def folders(self) -> tuple[tuple[Path, bool], tuple[Path, bool]]:
        """The dense model and this one, each with whether code in its folder may run."""
        return (self.dense.checkpoint.path, False), (self.model, self.custom_code)

    def load(self) -> tuple[LoadedModel, TextModel | OnnxText]:
        """Both in memory.

        Raises InputError when their tokenizers differ, because their tokens could not be compared, and for an export
        that cannot score a text.
        """
        sliced: TextModel | OnnxText
        if is_onnx(self.model):
            sliced = load_onnx(self.model, spin=False)
            sliced.session.demand_all_logits()
        else:
            sliced = load_cut(self.model, trust_remote_code=self.custom_code)
        dense = self.dense.load()
        if dense.vocab != sliced.vocab or not same_tokens(dense.tokenizer, sliced.tokenizer, dense.vocab):
            raise InputError(
                f"{self.model} and {self.dense.name} have different tokenizers.",
                hint="Compare a model with the one that it was cut from.",
            )
        return dense, sliced


def find_contenders(
    given: str | None, against: str | None, workspace: Workspace, *, option: str = "--against"
) -> Contenders:
    """An artifact (by folder, by name, or the last one), an exported folder, or a plain folder with `against`.

    `against` is the dense model, which the command calls `option`; None is where the build found it.

    Raises ArtifactError for damaged files or another dense model, InputError for a plain folder without `against`.
    """
    folder = Path(given) if given is not None else None
    if folder is None or not (folder / "config.json").is_file() or (folder / MASK).is_file():
        folder = workspace.find(given)
        dense = dense_of(folder, check_manifest(folder), against)
        return Contenders(folder.name, folder / MODEL, ships_code(folder / MODEL), folder, dense)
    if (folder / MANIFEST).is_file():
        dense = dense_of(folder, check_manifest(folder), against)
    elif against is not None:
        dense = open_dense(against)
    else:
        raise InputError(f"{folder} does not say what it was cut from.", hint=f"Name the dense model with {option}.")
    return Contenders(folder.resolve().name, folder, ships_code(folder), None, dense)

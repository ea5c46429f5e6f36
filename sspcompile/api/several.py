"""What `sspcompile.build(..., nested=...)` gives, and `sspcompile.load` of such a folder: several sizes in one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

from sspcompile.api.artifact import Artifact, placement_in
from sspcompile.api.given import Place, number_of, path_of, whole_of
from sspcompile.errors import InputError
from sspcompile.progress import Progress, silent

if TYPE_CHECKING:
    from sspcompile.api.arguments import Named
    from sspcompile.bench.drafting import DraftResult
    from sspcompile.model.decoder import TextModel
    from sspcompile.model.placement import Placing
    from sspcompile.nested.index import Nested
    from sspcompile.report.model import Report, RoundingSection
    from sspcompile.slicing.mask import HeadMask


@dataclass(frozen=True)
class NestedArtifact(Artifact):
    """A finished nested build in the folder `path`. What takes one model (`report`, `mask`, `plan`, `evaluate`,
    `weigh`, `bench`) raises InputError: `cut` a member out, which the command line takes for all of that. `export`
    takes a `size`, or writes all of them for "onnx".
    """

    @property
    def nested(self) -> Nested:
        """The order of removal, and of every member its counts, sizes and loss."""
        from sspcompile.nested.index import read_nested

        return read_nested(self.path)

    @property
    def sizes(self) -> tuple[float, ...]:
        """The members as shares of all parameters, the whole model first."""
        return tuple(member.share for member in self.nested.members)

    def cut(self, size: float, out: Place, *, overwrite: bool = False, progress: Progress = silent) -> Path:
        """Write the largest member of at most that size as an ordinary cut, repaired; gives its folder.

        No model is loaded. Raises BudgetError below the smallest member, and InputError for a folder that exists.
        """
        from sspcompile.api.members import cut_member, open_member

        folder, share = path_of(out, "out"), number_of(size, "size")
        if share is None:
            raise InputError("No size was given.", hint=f"It holds {', '.join(f'{one:g}' for one in self.sizes)}.")
        cut_member(open_member(self.path, share), folder, overwrite=overwrite, progress=progress)
        return folder

    def load_model(self, **place: Unpack[Placing]) -> TextModel:
        """All sizes and the tokenizer in memory, the whole first: `.model.set_size(0.7)`, `.model.at(0.7)`.

        It is not spread over devices. Raises InputError, CheckpointError, and ArtifactError for a class not ours.
        """
        from sspcompile.api.drafts import load_nested
        from sspcompile.model.chat import rendering_of

        placement = placement_in(**place)
        return load_nested(self._named, placement=placement, rendering=rendering_of(self.options))

    def bench_draft(
        self,
        *,
        quick: bool = True,
        new_tokens: int | None = None,
        repeats: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        progress: Progress = silent,
    ) -> DraftResult:
        """How often the smallest member is right as a draft for the whole, and what that gains. Raises InputError."""
        from sspcompile.api.drafts import bench_drafts

        return bench_drafts(
            self._named,
            quick=quick,
            new_tokens=whole_of(new_tokens, "new_tokens"),
            repeats=whole_of(repeats, "repeats"),
            placement=placement_in(device=device, dtype=dtype, threads=threads),
            progress=progress,
        )

    @property
    def report(self) -> Report:
        """Refused: each size has its own loss, which `nested` has."""
        self._refuse("report")

    @property
    def mask(self) -> HeadMask:
        """Refused: each size has its own."""
        self._refuse("mask")

    def plan(self) -> dict[str, Any]:
        """Refused: each size has its own, which `cut` writes."""
        self._refuse("plan")

    def weigh(self, *_: Any, **__: Any) -> RoundingSection:
        """Refused: one size is weighed at a time."""
        self._refuse("rounding")

    @property
    def _named(self) -> Named:
        from sspcompile.api.arguments import demand, named
        from sspcompile.workspace import Workspace

        return demand(named(str(self.path), Workspace(self.root)), "nested", command="load")

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(
            f"{self.path} is a nested artifact, which holds several sizes, and has no {what} of one.",
            hint=f"See `nested` for all of them, or cut one out: `sspcompile slice --from {self.path} --size 0.8`.",
        )

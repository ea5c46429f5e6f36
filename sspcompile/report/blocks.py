"""A page as titled blocks of sentences, pictures and tables of plain text: what every renderer takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sspcompile.report.first import FirstScreen, Picture
from sspcompile.report.format import clean


@dataclass(frozen=True)
class Table:
    """Cells are cleaned text; the first column names the row."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Block:
    """`key` is stable and fit for an anchor; `hint` says what a reader finds in it before it is unfolded."""

    key: str
    title: str
    sentences: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    picture: Picture | None = None
    hint: str = ""


@dataclass(frozen=True)
class Page:
    """What a renderer takes. Every text in it is cleaned of control characters. Below a first screen the blocks are
    details.
    """

    title: str
    blocks: tuple[Block, ...]
    first: FirstScreen | None = None

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Those that have files of their own."""
        mask = [self.first.mask] if self.first and self.first.mask else []
        return (*mask, *(block.picture for block in self.blocks if block.picture))


def page(title: str, blocks: Iterable[Block | None], first: FirstScreen | None = None) -> Page:
    """A page of the blocks that are there."""
    return Page(clean(title), tuple(_cleaned(block) for block in blocks if block is not None), first)


def _cleaned(block: Block) -> Block:
    tables = tuple(
        Table(clean(t.caption), tuple(map(clean, t.headers)), tuple(tuple(map(clean, row)) for row in t.rows))
        for t in block.tables
    )
    sentences = tuple(map(clean, block.sentences))
    return Block(block.key, clean(block.title), sentences, tables, block.picture, clean(block.hint))

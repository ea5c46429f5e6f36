"""What a refusal of the command line looks like."""

from __future__ import annotations


def refused(done: tuple[int, str, str], *fragments: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that has all the fragments."""
    assert done[0] == 2 and done[1] == "" and done[2].startswith("Error: ") and done[2].count("\n") == 1, done
    assert not [fragment for fragment in fragments if fragment not in done[2]], done

"""Prompts for a server: plain words, no two prompts beginning alike, so that no cache of prefixes can answer them."""

from __future__ import annotations

import random

# Common words, each of them one token for most tokenizers. The server says how many tokens a prompt had.
_TEXT = (
    "about after again all also always and another any around as ask at away back because been before best better "
    "big book both bring but by call can car change city close cold come could country cut day did different do "
    "does door down each early earth end even every example eye face fact family far fast father feel few find "
    "fire first five food foot for form four friend from full game get girl give go good great green ground group "
    "grow hand hard has have he head hear help her here high him his home horse hour house how idea if in into is "
    "it just keep kind know land large last late learn leave left letter life light like line list little live "
    "long look made make man many may mean men might mile more morning most mother mountain move much music must "
    "name near need never new next night no north not now number of off often old on once one only open or other "
    "our out over own page paper part people place plan plant play point power question read real red right river "
    "road room run said same saw say school sea second see set she ship short show side sleep slow small so some "
    "song soon south space stand start state stay step still stop story street strong study such sun sure table "
    "take talk tell ten than that the their them then there these they thing think this three through time to "
    "together too town travel tree true turn two under until up us use very voice wait walk want war warm was "
    "watch water way we week well went were west what when where which while white who why will wind with wood "
    "word work world would write year yes you young your"
)
WORDS = tuple(_TEXT.split())


def prompt(seed: int, number: int, words: int) -> str:
    """The prompt of this number, of so many words. Neighbours differ in their first word, all within the first few.

    The order of the first words follows from the seed: a server that keeps the prefixes of an earlier run has none of
    them.
    """
    order = random.Random(seed).sample(WORDS, len(WORDS))
    first: list[str] = []
    rest = number
    while rest or not first:
        rest, digit = divmod(rest, len(order))
        first.append(order[digit])
    more = random.Random(f"{seed} {number}").choices(WORDS, k=words)
    return " ".join([*first, *more][:words])

"""Sports, outside the six: the same places filled with other content, for the unknown case. Never trained on."""

from training.corpus.shape import Domain, Rule, Scene, Table, added, compared, multiplied

EQUIPMENT = {
    "tennis": "racket",
    "cricket": "bat",
    "golf": "club",
    "archery": "bow",
    "rowing": "oar",
    "fencing": "foil",
    "skiing": "skis",
    "cycling": "bicycle",
    "darts": "dart",
    "sailing": "boat",
    "curling": "stone",
    "boxing": "gloves",
    "snooker": "cue",
    "surfing": "board",
}
GAMES_OF_PLAYERS = {
    "Pele": "football",
    "Jordan": "basketball",
    "Federer": "tennis",
    "Bolt": "sprinting",
    "Phelps": "swimming",
    "Ali": "boxing",
    "Gretzky": "hockey",
    "Woods": "golf",
    "Merckx": "cycling",
    "Biles": "gymnastics",
    "Tendulkar": "cricket",
    "Hamilton": "racing",
}
TEAM_SIZES = {
    "football": "11",
    "basketball": "5",
    "volleyball": "6",
    "baseball": "9",
    "rugby union": "15",
    "rugby league": "13",
    "water polo": "7",
    "handball": "7",
    "ice hockey": "6",
    "cricket": "11",
    "netball": "7",
    "polo": "4",
    "curling": "4",
    "lacrosse": "10",
}

DOMAIN = Domain(
    name="sports",
    first=Table(
        nouns=("the equipment for {k}", "the main equipment in {k}", "the thing that athletes need for {k}"),
        facts=EQUIPMENT,
    ),
    second=Table(nouns=("the sport of {k}", "the sport that made {k} famous"), facts=GAMES_OF_PLAYERS),
    figures=Table(
        nouns=("the team size in {k}", "the number of players in a {k} team", "the player count of a {k} side"),
        facts=TEAM_SIZES,
    ),
    rules=(
        Rule(
            nouns=(
                "the points of a team with {a} wins at {b} points each",
                "the score after {a} rounds if each gives {b} points",
            ),
            draw=multiplied((2, 9), (2, 9)),
        ),
        Rule(
            nouns=(
                "the final score of a player with {a} points before the break and {b} after it",
                "the goals in a season with {a} goals at home and {b} away",
            ),
            draw=added((1, 20), (1, 20)),
        ),
    ),
    verdict=Rule(
        nouns=(
            "the result for a team that scores {a} while the rival scores {b}",
            "the result of a match for the side with {a} against {b}",
        ),
        draw=compared((1, 40), "defeat", "victory"),
        outcomes=("defeat", "victory"),
    ),
    scene=Scene(
        kind="table",
        rows=("{n} plays {i}, {a} medals.", "{n} trains {m}."),
        near=("the sport that {n} plays", "the sport of {n}"),
        far=("the athlete who plays {i}", "the athlete in {i}"),
        deep=("the sport of the athlete whom {n} trains", "the sport that {n} trains"),
        number=("the number of medals that {n} won", "the number of medals of {n}"),
    ),
)

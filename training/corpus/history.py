"""History: leaders, inventions, years and archives."""

from training.corpus.shape import Domain, Rule, Scene, Table, added, compared, subtracted

COUNTRIES = {
    "Caesar": "Rome",
    "Napoleon": "France",
    "Bismarck": "Prussia",
    "Lenin": "Russia",
    "Gandhi": "India",
    "Lincoln": "America",
    "Churchill": "Britain",
    "Bolivar": "Venezuela",
    "Cleopatra": "Egypt",
    "Pericles": "Athens",
    "Ataturk": "Turkey",
    "Garibaldi": "Italy",
    "Meiji": "Japan",
    "Franco": "Spain",
}
INVENTORS = {
    "the telephone": "Bell",
    "dynamite": "Nobel",
    "the light bulb": "Edison",
    "the radio": "Marconi",
    "the telegraph": "Morse",
    "the printing press": "Gutenberg",
    "vaccination": "Jenner",
    "penicillin": "Fleming",
    "the steam engine": "Watt",
    "the battery": "Volta",
    "the cotton gin": "Whitney",
    "the airship": "Zeppelin",
}
YEARS = {
    "the battle of Hastings": "1066",
    "the Magna Carta": "1215",
    "the voyage of Columbus": "1492",
    "the fall of Constantinople": "1453",
    "the start of the Reformation": "1517",
    "the Spanish Armada": "1588",
    "the American declaration of independence": "1776",
    "the French Revolution": "1789",
    "the battle of Waterloo": "1815",
    "the start of the First World War": "1914",
    "the Russian Revolution": "1917",
    "the start of the Second World War": "1939",
    "the first Moon landing": "1969",
    "the fall of the Berlin Wall": "1989",
}

DOMAIN = Domain(
    name="history",
    first=Table(
        nouns=("the country of {k}", "the homeland of {k}", "the state that is linked with {k}"), facts=COUNTRIES
    ),
    second=Table(nouns=("the inventor of {k}", "the pioneer who gave us {k}"), facts=INVENTORS),
    figures=Table(nouns=("the year of {k}", "the date of {k} as a year", "the year that brought {k}"), facts=YEARS),
    rules=(
        Rule(
            nouns=(
                "the length of a reign from year {b} to year {a}",
                "the number of years that a king ruled who began in year {b} and ended in year {a}",
            ),
            draw=subtracted((3, 30)),
        ),
        Rule(
            nouns=(
                "the last year of a war that began in year {a} and lasted {b} years",
                "the year in which peace came if a war of {b} years began in year {a}",
            ),
            draw=added((1, 20), (1, 20)),
        ),
    ),
    verdict=Rule(
        nouns=(
            "the outcome of a senate vote with {a} in favour and {b} against",
            "the fate of a law with {a} votes in favour and {b} votes against",
        ),
        draw=compared((1, 40), "rejected", "passed"),
        outcomes=("rejected", "passed"),
    ),
    scene=Scene(
        kind="succession",
        rows=("{i} precedes {j}, {a} years.",),
        near=("the leader who comes after {i}", "the leader right behind {i}"),
        far=("the leader who comes two after {i}", "the leader two places behind {i}"),
        deep=("the leader who comes three after {i}", "the leader three places behind {i}"),
        number=(
            "the number of years of the leader right behind {i}",
            "the reign in years of the leader who comes after {i}",
        ),
    ),
)

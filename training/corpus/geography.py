"""Geography, outside the six: the same places filled with other content, for the unknown case. Never trained on."""

from training.corpus.shape import Domain, Rule, Scene, Table, added, compared, subtracted

CAPITALS = {
    "Norway": "Oslo",
    "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Kenya": "Nairobi",
    "Peru": "Lima",
    "Cuba": "Havana",
    "Canada": "Ottawa",
    "Iraq": "Baghdad",
    "Nepal": "Kathmandu",
    "Ghana": "Accra",
    "Chile": "Santiago",
    "Finland": "Helsinki",
    "Hungary": "Budapest",
}
CONTINENTS = {
    "the Nile": "Africa",
    "the Amazon": "South America",
    "the Danube": "Europe",
    "the Ganges": "Asia",
    "the Mississippi": "North America",
    "the Congo": "Africa",
    "the Volga": "Europe",
    "the Mekong": "Asia",
    "the Darling": "Australia",
    "the Rhine": "Europe",
    "the Indus": "Asia",
    "the Yukon": "North America",
}
CALLING_CODES = {
    "Norway": "47",
    "Portugal": "351",
    "Austria": "43",
    "Poland": "48",
    "Kenya": "254",
    "Peru": "51",
    "Cuba": "53",
    "Iraq": "964",
    "Nepal": "977",
    "Ghana": "233",
    "Chile": "56",
    "Finland": "358",
    "Hungary": "36",
    "Mexico": "52",
}

DOMAIN = Domain(
    name="geography",
    first=Table(nouns=("the capital of {k}", "the capital city of {k}", "the city that governs {k}"), facts=CAPITALS),
    second=Table(nouns=("the continent of {k}", "the continent where {k} flows"), facts=CONTINENTS),
    figures=Table(
        nouns=("the calling code of {k}", "the telephone code for {k}", "the dialling code of {k}"), facts=CALLING_CODES
    ),
    rules=(
        Rule(
            nouns=(
                "the height difference between a peak at {a} and a valley at {b}",
                "the climb from a village at {b} to a pass at {a}",
            ),
            draw=subtracted((3, 30)),
        ),
        Rule(
            nouns=(
                "the length of a route with {a} miles of coast and {b} miles of desert",
                "the distance over {a} miles of river and {b} miles of road",
            ),
            draw=added((1, 20), (1, 20)),
        ),
    ),
    verdict=Rule(
        nouns=(
            "the direction from latitude {a} north to latitude {b} north",
            "the heading of a ship that sails from {a} degrees north to {b} degrees north",
        ),
        draw=compared((1, 40), "north", "south"),
        outcomes=("north", "south"),
    ),
    scene=Scene(
        kind="listing",
        rows=("Stops: {list}.", "Nights: {list}."),
        near=("the country right after {i}", "the next country behind {i}"),
        far=("the {o} country", "the country in {o} place"),
        deep=("the country right after {i}", "the next country behind {i}"),
        number=("the {o} number of nights", "the number of nights in {o} place"),
    ),
)

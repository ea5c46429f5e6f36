"""Chemistry: elements, atoms and what stands on the shelf."""

from random import Random

from training.corpus.shape import Domain, Fields, Rule, Scene, Table, subtracted

SYMBOLS = {
    "sodium": "Na",
    "potassium": "K",
    "iron": "Fe",
    "copper": "Cu",
    "silver": "Ag",
    "gold": "Au",
    "tin": "Sn",
    "lead": "Pb",
    "mercury": "Hg",
    "zinc": "Zn",
    "calcium": "Ca",
    "magnesium": "Mg",
    "neon": "Ne",
    "helium": "He",
}
ATOMIC_NUMBERS = {
    "sodium": "11",
    "potassium": "19",
    "iron": "26",
    "copper": "29",
    "silver": "47",
    "gold": "79",
    "tin": "50",
    "lead": "82",
    "mercury": "80",
    "zinc": "30",
    "calcium": "20",
    "magnesium": "12",
    "neon": "10",
    "helium": "2",
}
FLAMES = {
    "sodium": "yellow",
    "potassium": "violet",
    "calcium": "orange",
    "lithium": "red",
    "strontium": "crimson",
    "barium": "green",
    "copper": "turquoise",
    "caesium": "blue",
    "magnesium": "white",
    "iron": "golden",
}
MOLECULES = (
    ("hydrogen", "water", 2),
    ("hydrogen", "ammonia", 3),
    ("hydrogen", "methane", 4),
    ("hydrogen", "ethane", 6),
    ("oxygen", "ozone", 3),
    ("carbon", "ethane", 2),
    ("carbon", "propane", 3),
    ("hydrogen", "propane", 8),
    ("carbon", "benzene", 6),
    ("carbon", "butane", 4),
    ("carbon", "pentane", 5),
    ("carbon", "octane", 8),
    ("chlorine", "chloroform", 3),
    ("oxygen", "silica", 2),
)


def _atoms(rng: Random) -> tuple[Fields, str]:
    atom, molecule, each = rng.choice(MOLECULES)
    count = rng.randint(2, 9)
    return {"a": count, "x": atom, "m": molecule}, str(count * each)


def _acidity(rng: Random) -> tuple[Fields, str]:
    ph, volume = rng.choice([1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13]), rng.randint(2, 40)
    return {"a": ph, "b": volume}, "acidic" if ph < 7 else "basic"


DOMAIN = Domain(
    name="chemistry",
    first=Table(
        nouns=("the symbol of {k}", "the chemical symbol for {k}", "the short symbol that stands for {k}"),
        facts=SYMBOLS,
    ),
    second=Table(nouns=("the flame colour of {k}", "the colour that {k} gives to a flame"), facts=FLAMES),
    figures=Table(
        nouns=("the atomic number of {k}", "the number of protons in {k}", "the proton count of {k}"),
        facts=ATOMIC_NUMBERS,
    ),
    rules=(
        Rule(
            nouns=(
                "the number of {x} atoms in {a} molecules of {m}",
                "the count of {x} atoms if we have {a} molecules of {m}",
            ),
            draw=_atoms,
        ),
        Rule(
            nouns=(
                "the number of neutrons for mass number {a} and {b} protons",
                "the neutron count of an isotope with mass number {a} and {b} protons",
            ),
            draw=subtracted((3, 30)),
        ),
    ),
    verdict=Rule(
        nouns=(
            "the nature of {b} litres of a solution with pH {a}",
            "the kind of solution we get at pH {a} in {b} litres",
        ),
        draw=_acidity,
        outcomes=("acidic", "basic"),
    ),
    scene=Scene(
        kind="table",
        rows=("{n} has {i}, {a} grams.", "{n} helps {m}."),
        near=("the element that {n} has", "the element of {n}"),
        far=("the student who has {i}", "the student with {i}"),
        deep=("the element of the student whom {n} helps", "the element that {n} helps with"),
        number=("the number of grams that {n} has", "the amount in grams of {n}"),
    ),
)

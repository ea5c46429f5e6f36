"""Mathematics: names, letters, shapes and small sums."""

from training.corpus.shape import Domain, Rule, Scene, Table, added, compared, multiplied

PEOPLE = {
    "geometry": "Euclid",
    "calculus": "Newton",
    "logic": "Boole",
    "probability": "Pascal",
    "set theory": "Cantor",
    "prime sieves": "Eratosthenes",
    "graph theory": "Euler",
    "group theory": "Galois",
    "matrices": "Cayley",
    "fractals": "Mandelbrot",
    "game theory": "Nash",
    "statistics": "Bayes",
    "topology": "Poincare",
    "number theory": "Gauss",
}
LETTERS = {
    "the circle ratio": "pi",
    "an angle": "theta",
    "a sum": "sigma",
    "a difference": "delta",
    "a mean": "mu",
    "a small error": "epsilon",
    "the golden ratio": "phi",
    "a correlation": "rho",
    "an eigenvalue": "lambda",
    "a significance level": "alpha",
    "a damping ratio": "zeta",
    "a frequency": "omega",
}
SIDES = {
    "triangle": "3",
    "square": "4",
    "pentagon": "5",
    "hexagon": "6",
    "heptagon": "7",
    "octagon": "8",
    "nonagon": "9",
    "decagon": "10",
    "hendecagon": "11",
    "dodecagon": "12",
    "rhombus": "4",
    "rectangle": "4",
    "trapezium": "4",
    "icosagon": "20",
}

DOMAIN = Domain(
    name="math",
    first=Table(
        nouns=(
            "the mathematician linked with {k}",
            "the mathematician we remember for {k}",
            "the famous mathematician behind {k}",
        ),
        facts=PEOPLE,
    ),
    second=Table(nouns=("the Greek letter for {k}", "the Greek letter that denotes {k}"), facts=LETTERS),
    figures=Table(
        nouns=("the number of sides of a {k}", "the number of corners of a {k}", "the side count of a {k}"), facts=SIDES
    ),
    rules=(
        Rule(nouns=("the product of {a} and {b}", "the value of {a} times {b}"), draw=multiplied((2, 9), (2, 9))),
        Rule(nouns=("the sum of {a} and {b}", "the value of {a} plus {b}"), draw=added((1, 20), (1, 20))),
    ),
    verdict=Rule(
        nouns=("the sign of {a} minus {b}", "the sign of the difference when we take {b} from {a}"),
        draw=compared((1, 40), "negative", "positive"),
        outcomes=("negative", "positive"),
    ),
    scene=Scene(
        kind="listing",
        rows=("Topics: {list}.", "Scores: {list}."),
        near=("the topic right after {i}", "the next topic behind {i}"),
        far=("the {o} topic", "the topic in {o} place"),
        deep=("the topic right after {i}", "the next topic behind {i}"),
        number=("the {o} score", "the score in {o} place"),
    ),
)

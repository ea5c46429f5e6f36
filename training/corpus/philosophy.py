"""Philosophy: works, founders, centuries, arguments and truth values."""

from random import Random

from training.corpus.shape import Domain, Fields, Rule, Scene, Table, multiplied, subtracted

WORKS = {
    "Plato": "Republic",
    "Hobbes": "Leviathan",
    "Spinoza": "Ethics",
    "Descartes": "Meditations",
    "Kant": "Critique",
    "Mill": "Utilitarianism",
    "Marx": "Capital",
    "Sartre": "Nausea",
    "Voltaire": "Candide",
    "More": "Utopia",
    "Augustine": "Confessions",
    "Rousseau": "Emile",
    "Montaigne": "Essays",
    "Boethius": "Consolation",
}
FOUNDERS = {
    "stoicism": "Zeno",
    "pragmatism": "Peirce",
    "positivism": "Comte",
    "existentialism": "Kierkegaard",
    "phenomenology": "Husserl",
    "utilitarianism": "Bentham",
    "deconstruction": "Derrida",
    "skepticism": "Pyrrho",
    "the Lyceum": "Aristotle",
    "the Academy": "Plato",
    "the Garden": "Epicurus",
    "cynicism": "Antisthenes",
}
BIRTH_CENTURIES = {
    "Hobbes": "16",
    "Spinoza": "17",
    "Descartes": "16",
    "Kant": "18",
    "Mill": "19",
    "Marx": "19",
    "Sartre": "20",
    "Voltaire": "17",
    "More": "15",
    "Augustine": "4",
    "Rousseau": "18",
    "Montaigne": "16",
    "Boethius": "5",
    "Aquinas": "13",
}
CLAIMS = ("p", "q", "r", "s", "t", "u", "v", "w")


def _truth(rng: Random) -> tuple[Fields, str]:
    left, right = rng.sample(CLAIMS, 2)
    first, second, joined = rng.random() < 0.5, rng.random() < 0.5, rng.choice(("and", "or"))
    truth = (first and second) if joined == "and" else (first or second)
    fields: Fields = {"x": left, "y": right, "o": joined, "a": str(first).lower(), "b": str(second).lower()}
    return fields, str(truth).lower()


DOMAIN = Domain(
    name="philosophy",
    first=Table(
        nouns=("the main work of {k}", "the famous book by {k}", "the book that {k} is known for"), facts=WORKS
    ),
    second=Table(nouns=("the founder of {k}", "the thinker who founded {k}"), facts=FOUNDERS),
    figures=Table(
        nouns=("the birth century of {k}", "the century in which {k} was born", "the century of the birth of {k}"),
        facts=BIRTH_CENTURIES,
    ),
    rules=(
        Rule(
            nouns=(
                "the number of premises in {a} arguments with {b} premises each",
                "the premise count of {a} arguments if each has {b} premises",
            ),
            draw=multiplied((2, 9), (2, 9)),
        ),
        Rule(
            nouns=(
                "the number of claims left when a critic refutes {b} of {a} claims",
                "the number of claims that survive if {b} of {a} claims fall",
            ),
            draw=subtracted((3, 30)),
        ),
    ),
    verdict=Rule(
        nouns=(
            "the truth value of {x} {o} {y} when {x} is {a} and {y} is {b}",
            "the truth value of the claim {x} {o} {y} given {x} is {a} and {y} is {b}",
        ),
        draw=_truth,
        outcomes=("true", "false"),
    ),
    scene=Scene(
        kind="implication",
        rows=("{n} reads {i}.", "{i} inspires {j}, {a} pages."),
        near=("the philosopher that {n} reads", "the philosopher on the list of {n}"),
        far=("the philosopher that the reading of {n} inspires", "the philosopher that follows from the list of {n}"),
        deep=("the last philosopher that the reading of {n} leads to", "the philosopher at the end of the list of {n}"),
        number=("the number of pages of the reading of {n}", "the pages on the list of {n}"),
    ),
)

"""Finance: currencies, balance sheets, interest and holdings."""

from random import Random

from training.corpus.shape import Domain, Fields, Rule, Scene, Table, compared, subtracted

CODES = {
    "yen": "JPY",
    "pounds": "GBP",
    "francs": "CHF",
    "rupees": "INR",
    "kronor": "SEK",
    "zloty": "PLN",
    "pesos": "MXN",
    "reais": "BRL",
    "yuan": "CNY",
    "won": "KRW",
    "rand": "ZAR",
    "lira": "TRY",
    "dollars": "USD",
    "euros": "EUR",
}
ISO_NUMBERS = {
    "yen": "392",
    "pounds": "826",
    "francs": "756",
    "rupees": "356",
    "kronor": "752",
    "zloty": "985",
    "pesos": "484",
    "reais": "986",
    "yuan": "156",
    "won": "410",
    "rand": "710",
    "lira": "949",
    "dollars": "840",
    "euros": "978",
}
SHEET_CLASSES = {
    "inventory": "asset",
    "cash": "asset",
    "machinery": "asset",
    "receivables": "asset",
    "payables": "liability",
    "loans": "liability",
    "mortgages": "liability",
    "overdrafts": "liability",
    "shares": "equity",
    "reserves": "equity",
    "retained profits": "equity",
    "deposits received": "liability",
}


def _interest(rng: Random) -> tuple[Fields, str]:
    hundreds, percent = rng.randint(2, 9), rng.randint(2, 9)
    return {"a": 100 * hundreds, "b": percent}, str(hundreds * percent)


DOMAIN = Domain(
    name="finance",
    first=Table(nouns=("the currency code of {k}", "the code for {k}", "the code that banks use for {k}"), facts=CODES),
    second=Table(
        nouns=("the balance sheet class of {k}", "the class that accountants give to {k}"), facts=SHEET_CLASSES
    ),
    figures=Table(
        nouns=("the ISO number of {k}", "the ISO currency number for {k}", "the number that ISO gives to {k}"),
        facts=ISO_NUMBERS,
    ),
    rules=(
        Rule(
            nouns=(
                "the interest for one year on a loan of {a} at {b} percent",
                "the yearly interest if {a} is lent at {b} percent",
            ),
            draw=_interest,
        ),
        Rule(
            nouns=(
                "the profit with revenue of {a} and costs of {b}",
                "the profit of a shop that earns {a} and spends {b}",
            ),
            draw=subtracted((3, 30)),
        ),
    ),
    verdict=Rule(
        nouns=(
            "the outcome of buying at {a} and selling at {b}",
            "the outcome of a trade bought at {a} and sold at {b}",
        ),
        draw=compared((1, 40), "gain", "loss"),
        outcomes=("gain", "loss"),
    ),
    scene=Scene(
        kind="ledger",
        rows=("{n} buys {i}, {a} million.",),
        near=("the first currency that {n} buys", "the first purchase of {n}"),
        far=("the last currency that {n} buys", "the last purchase of {n}"),
        deep=("the last currency that {n} buys", "the last purchase of {n}"),
        number=("the last number of millions that {n} pays", "the last amount in millions of {n}"),
    ),
)

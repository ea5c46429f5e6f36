"""What each domain is about, as words, and how people describe a deployment: sentences for the model to recognise.

The frames are the same in every domain, so only the subject tells domains apart.
"""

from __future__ import annotations

from random import Random

FRAMES: tuple[str, ...] = (
    "A helpdesk for questions about {a}.",
    "A helpdesk for questions about {a} and {b}",
    "An assistant that explains {a} and {b}.",
    "An assistant for people who work with {a}.",
    "A chatbot that answers questions on {a}, {b} and {c}.",
    "We run a service where customers ask about {a} and {b}.",
    "Our users want short answers about {a}.",
    "Our team needs help with {a} and {b} every day.",
    "A tutor for {a}, {b} and {c}.",
    "A tutor who helps pupils with {a}.",
    "It answers short questions about {a} or {b}.",
    "It looks up {a} and explains {b}.",
    "Staff ask it about {a} and {b} all day long.",
    "Support for beginners in {a}.",
    "A study group on {a} and {b}",
    "People write to us about {a}, {b} or {c}.",
    "Homework help in {a} for schools",
    "Customer support for {a} and {b}",
    "Questions about {a}",
    "{a}, {b} and {c}",
    "Tell me about {a} and {b}.",
    "A guide to {a} for visitors and newcomers.",
    "Consultants use it to talk about {a} with their clients.",
    "A small company that deals with {a} and needs an assistant.",
)

SUBJECTS: dict[str, tuple[str, ...]] = {
    "chemistry": (
        "chemistry", "chemical elements", "atoms", "molecules", "reactions", "acids", "bases", "salts", "metals",
        "gases", "laboratory work", "the laboratory", "reagents", "the periodic table", "isotopes",
        "protons and neutrons", "solutions and pH", "compounds", "minerals", "polymers", "catalysts",
        "chemical symbols", "atomic numbers", "flame colours", "titration", "crystals", "solvents", "organic chemistry",
        "chemists", "laboratory safety", "oxidation", "chemical bonds", "formulas of substances",
        "mixtures and substances", "electrolysis", "chemicals",
    ),
    "finance": (
        "finance", "banks", "a bank", "banking", "accounts", "loans", "interest rates", "savings", "mortgages",
        "stocks", "shares", "bonds", "funds", "currencies", "exchange rates", "insurance", "taxes", "budgets",
        "investments", "portfolios", "pensions", "credit cards", "payments", "profits and losses", "revenue",
        "accounting", "invoices", "dividends", "stock markets", "traders", "investors", "money", "inflation", "audits",
        "financial advice", "prices and fees",
    ),
    "history": (
        "history", "wars", "battles", "kings", "queens", "kings and wars", "empires", "treaties", "revolutions",
        "museums", "archives", "ancient Rome", "ancient Greece", "the Middle Ages", "dynasties", "reigns",
        "historical dates", "presidents", "emperors", "castles", "explorers", "leaders of the past", "medieval towns",
        "monuments", "the history of nations", "historians", "the past", "historical documents", "archaeology",
        "colonies", "the Cold War", "crusades", "parliaments of the past", "heritage", "a history museum", "centuries",
    ),
    "math": (
        "math", "mathematics", "arithmetic", "algebra", "geometry", "fractions", "equations", "sums", "products",
        "square roots", "numbers", "prime numbers", "triangles", "angles", "calculus", "statistics", "probability",
        "theorems", "proofs", "polynomials", "sequences", "multiplication", "addition and subtraction", "division",
        "percentages", "functions and graphs", "matrices", "logarithms", "number theory", "word problems", "counting",
        "circles and squares", "mathematicians", "integrals", "exercises in algebra", "math exams",
    ),
    "philosophy": (
        "philosophy", "ethics", "logic and arguments", "Plato", "Aristotle", "Socrates", "the Stoics", "Kant",
        "morality", "metaphysics", "free will", "philosophers", "premises and conclusions", "moral dilemmas",
        "epistemology", "knowledge and belief", "existentialism", "virtue", "justice", "the good life",
        "the mind and the body", "thought experiments", "utilitarianism", "Nietzsche", "Descartes", "Hume",
        "aesthetics", "political philosophy", "reason", "arguments", "critical thinking", "ethics and Plato",
        "consciousness", "truth", "schools of thought", "philosophical texts",
    ),
    "technology": (
        "technology", "software", "computers", "programming", "developers", "software developers", "code", "Python",
        "Java", "servers", "databases", "networks", "the cloud", "operating systems", "Linux", "bugs", "debugging",
        "web applications", "websites", "apps", "algorithms", "data structures", "security", "passwords", "APIs",
        "compilers", "programming languages", "variables and loops", "deployments", "IT support", "laptops", "routers",
        "machine learning", "devices", "source code", "incident tickets",
    ),
}  # fmt: skip


def draw_description(domain: str, rng: Random) -> str:
    """A sentence about a deployment in one of the six domains."""
    a, b, c = rng.sample(SUBJECTS[domain], 3)
    sentence = rng.choice(FRAMES).format(a=a, b=b, c=c)
    return sentence[0].upper() + sentence[1:]

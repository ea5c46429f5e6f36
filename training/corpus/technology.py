"""Technology: languages, products, ports and servers."""

from random import Random

from training.corpus.shape import Domain, Fields, Rule, Scene, Table, compared, multiplied

CREATORS = {
    "Python": "Rossum",
    "Java": "Gosling",
    "Perl": "Wall",
    "Ruby": "Matsumoto",
    "Modula": "Wirth",
    "Lisp": "McCarthy",
    "JavaScript": "Eich",
    "Swift": "Lattner",
    "Rust": "Hoare",
    "Scala": "Odersky",
    "Fortran": "Backus",
    "Smalltalk": "Kay",
    "Julia": "Bezanson",
    "Clojure": "Hickey",
}
MAKERS = {
    "Windows": "Microsoft",
    "Android": "Google",
    "the iPhone": "Apple",
    "Photoshop": "Adobe",
    "CUDA": "Nvidia",
    "the PlayStation": "Sony",
    "the Kindle": "Amazon",
    "Watson": "IBM",
    "Ryzen": "AMD",
    "Pentium": "Intel",
    "Instagram": "Meta",
    "Solaris": "Sun",
}
PORTS = {
    "HTTP": "80",
    "HTTPS": "443",
    "SSH": "22",
    "DNS": "53",
    "SMTP": "25",
    "FTP": "21",
    "Telnet": "23",
    "IMAP": "143",
    "LDAP": "389",
    "NTP": "123",
    "Kerberos": "88",
    "Finger": "79",
    "Gopher": "70",
    "Whois": "43",
}
VARIABLES = ("x", "n", "k", "i", "size", "total", "count", "index")


def _assignment(rng: Random) -> tuple[Fields, str]:
    start, step, name = rng.randint(1, 20), rng.randint(1, 20), rng.choice(VARIABLES)
    return {"v": name, "a": start, "b": step}, str(start + step)


DOMAIN = Domain(
    name="technology",
    first=Table(nouns=("the creator of {k}", "the designer of {k}", "the programmer who designed {k}"), facts=CREATORS),
    second=Table(nouns=("the maker of {k}", "the company behind {k}"), facts=MAKERS),
    figures=Table(nouns=("the default port of {k}", "the port number of {k}", "the network port for {k}"), facts=PORTS),
    rules=(
        Rule(
            nouns=(
                "the memory of {a} servers with {b} gigabytes each",
                "the number of gigabytes in {a} servers if each has {b} gigabytes",
            ),
            draw=multiplied((2, 9), (2, 9)),
        ),
        Rule(
            nouns=(
                "the value of {v} after the code {v} = {a}; {v} += {b}",
                "the value that the code {v} = {a}; {v} += {b} leaves in {v}",
            ),
            draw=_assignment,
        ),
    ),
    verdict=Rule(
        nouns=("the value of the test {a} < {b}", "the result that a program prints for {a} < {b}"),
        draw=compared((1, 40), "True", "False"),
        outcomes=("True", "False"),
    ),
    scene=Scene(
        kind="copies",
        rows=("{n} runs {i}, {a} jobs.", "{n} copies {m}."),
        near=("the language that {n} runs", "the language of {n}"),
        far=("the language that the copy {n} runs", "the language of the copy {n}"),
        deep=("the language at the root of {n}", "the root language of {n}"),
        number=("the number of jobs that the copy {n} runs", "the number of jobs of the copy {n}"),
    ),
)

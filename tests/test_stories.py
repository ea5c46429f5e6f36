"""What the embedded model reads: every question can be answered from the text, by the rules of its kind alone."""

from __future__ import annotations

import re
from itertools import pairwise
from random import Random

import pytest

from training.corpus import DOMAIN_DATA, DOMAINS, OUTSIDE_DOMAINS
from training.corpus.shape import OWNERS
from training.corpus.stories import KINDS, ORDINALS, READING_TASKS, scene_items, tell_story
from training.corpus.tasks import draw_reading, is_held_out

DRAWS = 60


def stories(domain):
    rng = Random(f"test/{domain}")
    for _ in range(DRAWS):
        yield tell_story(DOMAIN_DATA[domain], rng.sample(OWNERS, len(OWNERS)), rng)


def word_in(noun, words):
    """The only one of `words` that a noun phrase names."""
    (found,) = {word for word in re.findall(r"[\w-]+", noun) if word in words}
    return found


def fact(domain, item):
    return DOMAIN_DATA[domain].first.facts[item]


def answers(story, task):
    return [(noun, case.answer) for case in story.cases[task] for noun in case.nouns]


@pytest.mark.parametrize("domain", (*DOMAINS, *OUTSIDE_DOMAINS))
def test_every_kind_asks_every_task_with_wrong_answers_that_are_wrong(domain):
    for story in stories(domain):
        assert set(story.cases) == set(READING_TASKS)
        for task, cases in story.cases.items():
            for case in cases:
                assert case.answer not in case.wrong and len(set(case.wrong)) == 2
                assert len(case.nouns) >= 2
                if task != "read-deep":
                    assert re.search(rf"\b{re.escape(case.answer)}\b", story.text)


def test_a_table_is_asked_by_owner_by_item_and_by_helper():
    for story in stories("chemistry"):
        rows = re.findall(r"(\w+) has (\w+), (\d+) grams", story.text)
        by_owner = {n: (i, a) for n, i, a in rows}
        helped = dict(re.findall(r"(\w+) helps (\w+)\.", story.text))
        assert len(helped) == 2 and len(set(helped.values())) == 2
        for noun, answer in answers(story, "read-near"):
            assert answer == by_owner[word_in(noun, by_owner)][0]
        for noun, answer in answers(story, "read-number"):
            assert answer == by_owner[word_in(noun, by_owner)][1]
        for noun, answer in answers(story, "read-far"):
            assert answer == {i: n for n, i, _ in rows}[word_in(noun, scene_items(DOMAIN_DATA["chemistry"]))]
        for noun, answer in answers(story, "read-deep"):
            assert answer == fact("chemistry", by_owner[helped[word_in(noun, by_owner)]][0])


def test_a_ledger_is_asked_for_the_first_and_the_last_entry_of_an_owner():
    for story in stories("finance"):
        rows = re.findall(r"(\w+) buys (\w+), (\d+) million", story.text)
        for task, place, pick in (("read-near", 0, 1), ("read-far", -1, 1), ("read-number", -1, 2)):
            for noun, answer in answers(story, task):
                owner = word_in(noun, OWNERS)
                assert answer == [row for row in rows if row[0] == owner][place][pick]
        for noun, answer in answers(story, "read-deep"):
            owner = word_in(noun, OWNERS)
            assert answer == fact("finance", [row for row in rows if row[0] == owner][-1][1])


def test_a_succession_is_asked_one_two_and_three_places_along_the_line():
    items = scene_items(DOMAIN_DATA["history"])
    for story in stories("history"):
        rows = re.findall(r"(\w+) precedes (\w+), (\d+) years", story.text)
        after, years = {i: j for i, j, _ in rows}, {i: a for i, _, a in rows}
        for noun, answer in answers(story, "read-near"):
            assert answer == after[word_in(noun, items)]
        for noun, answer in answers(story, "read-far"):
            assert answer == after[after[word_in(noun, items)]]
        for noun, answer in answers(story, "read-deep"):
            assert answer == fact("history", after[after[after[word_in(noun, items)]]])
        for noun, answer in answers(story, "read-number"):
            assert answer == years[after[word_in(noun, items)]]


def test_a_listing_is_asked_by_place_and_by_neighbour():
    items = scene_items(DOMAIN_DATA["math"])
    for story in stories("math"):
        names, numbers = (row.split(": ")[1].rstrip(".").split(", ") for row in story.rows)
        after = dict(pairwise(names))
        for noun, answer in answers(story, "read-near"):
            assert answer == after[word_in(noun, items)]
        for noun, answer in answers(story, "read-deep"):
            assert answer == fact("math", after[word_in(noun, items)])
        for task, listed in (("read-far", names), ("read-number", numbers)):
            for noun, answer in answers(story, task):
                assert answer == listed[ORDINALS.index(word_in(noun, ORDINALS))]


def test_an_implication_is_followed_from_the_owner():
    for story in stories("philosophy"):
        reads = dict(re.findall(r"(\w+) reads (\w+)\.", story.text))
        rows = re.findall(r"(\w+) inspires (\w+), (\d+) pages", story.text)
        leads, pages = {i: j for i, j, _ in rows}, {i: a for i, _, a in rows}
        value = {
            "read-near": reads,
            "read-far": {n: leads[i] for n, i in reads.items()},
            "read-deep": {n: fact("philosophy", leads[leads[i]]) for n, i in reads.items()},
            "read-number": {n: pages[i] for n, i in reads.items()},
        }
        for task in READING_TASKS:
            for noun, answer in answers(story, task):
                assert answer == value[task][word_in(noun, OWNERS)]


def test_copies_are_followed_to_their_root():
    for story in stories("technology"):
        rows = re.findall(r"(\w+) runs (\w+), (\d+) jobs", story.text)
        runs, jobs = {n: i for n, i, _ in rows}, {n: a for n, _, a in rows}
        copied = dict(re.findall(r"(\w+) copies (\w+)\.", story.text))

        assert any(original in copied for original in copied.values()), "one copies a copy"
        root = {n: n for n in runs}
        for _ in copied:
            root |= {n: root[m] for n, m in copied.items() if m in root}
        value = {
            "read-near": runs,
            "read-far": {n: runs[root[n]] for n in copied},
            "read-deep": {n: fact("technology", runs[root[n]]) for n in copied},
            "read-number": {n: jobs[root[n]] for n in copied},
        }
        for task in READING_TASKS:
            for noun, answer in answers(story, task):
                assert answer == value[task][word_in(noun, OWNERS)]


def test_domains_differ_in_what_there_is_to_read():
    assert len({DOMAIN_DATA[domain].scene.kind for domain in DOMAINS}) == len(DOMAINS) == len(KINDS)


@pytest.mark.parametrize("held_out", [False, True])
def test_two_stories_in_one_text_share_no_person(held_out):
    rng = Random(f"pairs/{held_out}")
    for _ in range(DRAWS):
        pair = [DOMAIN_DATA[name] for name in rng.sample(DOMAINS, 2)]
        reading = draw_reading(pair, rng, held_out)
        people = [{name for name in OWNERS if name in story.text.split()} for _, story in reading.stories]
        assert not people[0] & people[1]
        assert is_held_out(reading.text) == held_out

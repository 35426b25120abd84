"""The noun phrases, relations and numbers of the benchmarks' prompts.

T2I-CompBench cuts prompts by spaCy's model of English. Here it is a rule for the sentences that those prompts are made
of; it needs no model, and other sentences can be cut differently.
"""

import re
from typing import NamedTuple

DETERMINERS = frozenset("a an the some one two three four five six seven eight nine ten".split())
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
# Where one phrase ends and another can begin.
_BETWEEN = frozenset(
    (
        "and or but with without of in on at by to from into onto over under above below behind beside between near "
        "next against around across through along inside outside beneath for as than while that which who whose "
        "where when"
    ).split()
)
# After these comes a verb or a bare adjective, and a phrase only behind an article.
_VERBS = frozenset("is are was were has have had be being been do does it its he she they them there".split())
_PLACES = ("top", "the top", "bottom", "the bottom", "side", "the side", "the left", "the right")  # are no things
_RELATIONS = {  # T2I-CompBench's, in the order in which they are looked for
    "on side of": "next to",
    "next to": "next to",
    "near": "next to",
    "on the left of": "left",
    "on the right of": "right",
    "on the bottom of": "bottom",
    "on the top of": "top",
    "on top of": "top",
}
_IRREGULAR = {"men": "man", "women": "woman", "people": "person", "children": "child", "mice": "mouse", "feet": "foot"}
_IRREGULAR |= {"knives": "knife", "leaves": "leaf", "wolves": "wolf", "shelves": "shelf", "sheep": "sheep"}


class Relation(NamedTuple):
    """`first` stands to `second` as `kind` says: next to, left, right, bottom or top."""

    first: str
    kind: str
    second: str


def noun_phrases(prompt: str) -> list[str]:
    """The things of a prompt with what is said before them: `a red car` of `a red car and a blue book`."""
    phrases = []
    for part in re.split(r"[,.;:!?()\"]+", prompt):
        words: list[str] = []
        after_verb = False
        for word in [*part.split(), "and"]:
            low = word.lower()
            if low in _BETWEEN or low in _VERBS:
                phrases += [" ".join(words)] if words and not after_verb else []
                words, after_verb = [], low in _VERBS
            elif low in DETERMINERS:
                phrases += [" ".join(words)] if words and not after_verb and not _all_determiners(words) else []
                words, after_verb = ([*words, word] if _all_determiners(words) else [word]), False
            else:
                words.append(word)
    return [each for each in phrases if each.lower() not in _PLACES and not _all_determiners(each.split())]


def _all_determiners(words: list[str]) -> bool:
    return all(word.lower() in DETERMINERS for word in words)


def without_determiner(phrase: str) -> str:
    """`red car` of `a red car`."""
    words = phrase.split()
    while len(words) > 1 and words[0].lower() in DETERMINERS:
        words.pop(0)
    return " ".join(words)


def bare_nouns(prompt: str) -> str:
    """The prompt with the last word of each noun phrase alone, and what stands between the phrases."""
    for phrase in noun_phrases(prompt):
        words = phrase.split()
        kept = [word for word in words[:-1] if word.lower() in DETERMINERS]
        prompt = prompt.replace(phrase, " ".join([*kept, words[-1]]), 1)
    return prompt


def find_relation(prompt: str) -> Relation | None:
    """The first relation that T2I-CompBench knows between the phrases before and behind it; None without one."""
    low = prompt.lower()
    for words, kind in _RELATIONS.items():
        if match := re.search(rf"\b{words}\b", low):
            before, behind = noun_phrases(prompt[: match.start()]), noun_phrases(prompt[match.end() :])
            if before and behind:
                return Relation(without_determiner(before[-1]), kind, without_determiner(behind[0]))
    return None


def find_counts(prompt: str) -> dict[str, int]:
    """{thing in the singular: how many} of the phrases that begin with a number or an article."""
    counts: dict[str, int] = {}
    for phrase in noun_phrases(prompt):
        number = NUMBERS.get(phrase.split()[0].lower())
        if number is not None:
            thing = without_determiner(phrase)
            counts[thing if number == 1 else singular(thing)] = number
    return counts


def singular(noun: str) -> str:
    """`fire truck` of `fire trucks`."""
    *before, word = noun.split()
    low = word.lower()
    if low in _IRREGULAR:
        word = _IRREGULAR[low]
    elif low.endswith("ies") and len(low) > 4:
        word = word[:-3] + "y"
    elif low.endswith(("ches", "shes", "sses", "xes", "zes")) or low.endswith("oes"):
        word = word[:-2]
    elif low.endswith("s") and not low.endswith(("ss", "us")):
        word = word[:-1]
    return " ".join([*before, word])

"""Answers in words against a table of what they mean, with the traps of the published rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agevlm_mlx.evaluation import parsing

SIDES = {"A": "left", "B": "right"}
COUNTS = {"A": "3", "B": "2", "C": "1", "D": "0"}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        # One letter, in the forms that models use.
        ("A", "A"),
        ("b", "B"),
        ("A.", "A"),
        ("b.", "B"),
        ("(A)", "A"),
        ("(b)", "B"),
        ("B)", "B"),
        ("B:", "B"),
        ("B. right", "B"),
        ("(B) right", "B"),
        ("  B\n", "B"),
        ("**B**", "B"),
        ('"B"', "B"),
        ("'A'", "A"),
        ("The answer is B", "B"),
        ("The answer is (B).", "B"),
        ("the answer is: b", "B"),
        ("Answer: B", "B"),
        ("Option A", "A"),
        ("option b", "B"),
        ("Option A is right.", "A"),
        ("I think it is A.", "A"),
        ("A because it is on that side", "A"),
        ("A\nThe cup is there", "A"),
        # An option's own words, as Cambrian and VLMEvalKit read them.
        ("left", "A"),
        ("Right.", "B"),
        ("A left", "A"),
        ("a left", "A"),
        ("**Left**", "A"),
        # Words are not letters: published rules read "T", "A" or "B" in all of these.
        ("The cat", ""),
        ("a bed", ""),
        ("A bed", ""),
        ("The answer is a bed", ""),
        ("the sofa", ""),
        ("both", ""),
        ("USA", ""),
        ("U.S.A.", ""),
        ("B-52", ""),
        ("Plan b", ""),
        # More than one letter is no answer, unless the last "answer is" settles it.
        ("A or B", ""),
        ("A, B", ""),
        ("A. left\nB. right", ""),
        ("A seems wrong. The answer is B", "B"),
        ("The answer is A. No, the answer is B", "B"),
        ("It is not A but B", "B"),
        ("The correct answer is B, not A", "B"),
        ("not B", ""),
        ("It isn't B", ""),
        ("The answer isn't B", ""),
        ("The answer is not B", ""),
        ("A's", ""),
        # No option at all.
        ("", ""),
        (" . ", ""),
        ("C", ""),
        ("on the left", ""),
        ("yes", ""),
    ],
)
def test_the_option_that_an_answer_names(said, meant):
    assert parsing.option(said, SIDES) == meant


@pytest.mark.parametrize(
    ("said", "meant"),
    [("2", "B"), ("2.", "B"), ("12", ""), ("two", ""), ("D", "D"), ("There are 2", ""), ("E", "")],
)
def test_an_option_that_is_a_number(said, meant):
    assert parsing.option(said, COUNTS) == meant


def test_options_without_words_and_with_letters_for_words():
    assert parsing.option("A left", {"A": "", "B": ""}) == ""
    assert parsing.option("", {"A": "", "B": ""}) == ""
    # The letter on a sign: "A" is the option A, not the option whose words are "a".
    assert parsing.option("A", {"A": "b", "B": "a"}) == "A"
    assert parsing.option("e.g. three", {letter: "" for letter in "ABCDEFG"}) == ""
    # Two options of the same words: neither is named.
    assert parsing.option("left", {"A": "left", "B": "left"}) == ""
    assert parsing.option("B", {"a": "left", "b": "right"}) == "b"


@given(st.text(alphabet="ABab ().:,*'\u2019isnotaswer\n", max_size=40) | st.text(max_size=40))
def test_any_answer_is_an_option_or_none(said):
    assert parsing.option(said, SIDES) in ("", "A", "B")
    assert parsing.yes_no_words(said) in ("", "yes", "no")
    assert parsing.yes_no_start(said) in ("", "yes", "no")


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("2", "2", True),
        (" 2. ", "2", True),
        ("Downhill.", "downhill", True),
        ("downhill", " Downhill", True),
        ("two", "2", False),
        ("2 cars", "2", False),
        ("", "2", False),
        (".", "2", False),
    ],
)
def test_a_short_answer(said, answer, right):
    assert parsing.same_words(said, answer) is right


@pytest.mark.parametrize(
    ("said", "words", "start"),
    [
        ("Yes", "yes", "yes"),
        ("no", "no", "no"),
        ("No.", "no", "no"),
        ("NO", "no", "no"),
        ("YES!", "yes", "yes"),
        ("Yes, there is no doubt", "", "yes"),
        ("There is no cat", "no", ""),
        ("The answer is yes", "yes", ""),
        ("It is not", "", ""),
        ("Not at all", "", "no"),
        ("None", "", "no"),
        ("Now", "", "no"),
        ("Eyes", "", "yes"),
        ("yes/no", "", "yes"),
        ("y", "", "yes"),
        ("N.", "", "no"),
        ("", "", ""),
        ("maybe", "", ""),
    ],
)
def test_yes_or_no_by_two_published_rules(said, words, start):
    assert parsing.yes_no_words(said) == words
    assert parsing.yes_no_start(said) == start

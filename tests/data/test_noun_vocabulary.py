"""Nouns found in free text: plurals, punctuation, the longest first, and where they stand."""

from agevlm_mlx.data.noun_vocabulary import NounVocabulary


def test_vocabulary_is_safe_for_words_plurals_and_punctuation():
    nouns = NounVocabulary(
        ["dog", "hot dog", "cat", "bus", "strawberry", "tomato", "glass", "glasses", "t-shirt"],
        synonyms={"kitten": "cat"},
    )
    assert nouns.mentions("A dog, two hot dogs; the CAT's dog-house!") == ["dog", "hot dog", "cat"]
    assert nouns.mentions("Buses and strawberries, tomatoes, tomatos, kittens.") == [
        "bus",
        "strawberry",
        "tomato",
        "tomato",
        "cat",
    ]
    assert nouns.mentions("glasses, a glass and t-shirts") == ["glasses", "glass", "t-shirt"]
    assert NounVocabulary(["fire", "fire truck"]).mentions("A fire truck on fire") == [
        "fire truck",
        "fire",
    ]
    assert nouns.mentions("concatenate dogma bust") == []
    assert nouns.mentions("dog dog") == ["dog", "dog"]
    assert nouns.mentions("") == []


def test_hyphens_may_be_spaces():
    nouns = NounVocabulary(["dog", "hot dog", "t-shirt"], hyphens=True)
    said = "hot-dog hot dogs dog-house dog t-shirts T shirt"
    assert nouns.mentions(said) == ["hot dog", "hot dog", "dog", "t-shirt", "t-shirt"]


def test_irregular_plurals_of_any_vocabulary():
    nouns = NounVocabulary(["snowman", "wolf", "wife", "tooth", "giraffe", "box", "person", "--"])
    said = "snowmen wolves wives teeth giraffes boxes people wolf"
    assert nouns.mentions(said) == [
        "snowman",
        "wolf",
        "wife",
        "tooth",
        "giraffe",
        "box",
        "person",
        "wolf",
    ]


def test_mentions_tell_where_they_stand():
    text = "The DOG\u2019s hot-dog, two hot  dogs' \u0130 dog's"
    found = list(NounVocabulary(["dog", "hot dog"]).find(text))
    assert [(noun, text[start:end]) for noun, start, end in found] == [
        ("dog", "DOG"),
        ("hot dog", "hot  dogs"),
        ("dog", "dog"),
    ]

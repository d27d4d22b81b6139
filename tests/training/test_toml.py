"""What `toml.dumps` writes, `tomllib` reads back."""

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agevlm_mlx.training import toml

keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = (
    st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3), max_leaves=6
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(keys, values, max_size=4))
def test_round_trip(tables):
    assert tomllib.loads(toml.dumps(tables)) == tables


def test_looks_like_a_recipe():
    text = toml.dumps({"train": {"seed": 1}, "stages": [{"name": "a"}, {"name": "b"}]})
    assert text == '[train]\nseed = 1\n\n[[stages]]\nname = "a"\n\n[[stages]]\nname = "b"\n'


def test_a_value_toml_has_no_word_for_is_refused():
    with pytest.raises(TypeError, match="NoneType"):
        toml.dumps({"a": None})

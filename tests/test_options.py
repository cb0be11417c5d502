"""The one table of options: names, values, precedence, and errors that tell the remedy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcu_compile.errors import InvalidValueError, UnknownNameError
from gcu_compile.options import NAMES, Options, env_name, resolve


def test_defaults_are_those_of_the_table():
    assert resolve({}, {}) == Options()


def test_code_beats_environment_beats_default():
    environ = {"GCU_COMPILE_TARGET": "cuda", "GCU_COMPILE_CACHE": "0"}
    effective = resolve({"target": "host"}, environ)
    assert (effective.target, effective.cache) == ("host", False)


def test_unknown_option_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown option 'shadw'.*Did you mean 'shadow'"):
        resolve({"shadw": "eager"}, {})


def test_unknown_variable_with_our_prefix_is_refused():
    with pytest.raises(UnknownNameError, match=r"GCU_COMPILE_TARGT.*GCU_COMPILE_TARGET"):
        resolve({}, {"GCU_COMPILE_TARGT": "host", "PATH": "/bin"})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("target", "gcu500", "'gcu300', 'gcu400'"),
        ("cache", "maybe", "boolean"),
        ("disable_rules", [1], "list of names"),
        ("disable_rules", 3, "list of names"),
        ("dump", 7, "text"),
        ("shadow", "float16", "'float64'"),
    ],
)
def test_wrong_value_says_what_is_valid(name, value, expected):
    with pytest.raises(InvalidValueError, match=expected):
        resolve({name: value}, {})


def test_names_from_text_and_from_lists_are_the_same():
    assert resolve({}, {"GCU_COMPILE_DISABLE_RULES": "a, b,"}).disable_rules == ("a", "b")
    assert resolve({"disable_rules": ["a", "b"]}, {}).disable_rules == ("a", "b")


@pytest.mark.parametrize(("text", "value"), [("1", "eager"), ("0", "off"), ("float64", "float64")])
def test_shadow_reads_a_boolean_as_eager(text, value):
    assert resolve({}, {"GCU_COMPILE_SHADOW": text}).shadow == value


def test_only_options_that_change_code_are_in_the_cache_key():
    key = resolve({"dump": "somewhere"}, {}).code_key()
    assert "dump" not in key and "disable_rules" in key
    assert key == resolve({"dump": "elsewhere"}, {}).code_key()
    assert key != resolve({"disable_rules": ["noop_view"]}, {}).code_key()


@given(st.text(min_size=1).filter(lambda name: name not in NAMES))
def test_no_other_name_is_ever_accepted(name):
    with pytest.raises(UnknownNameError):
        resolve({name: "1"}, {})


def test_every_option_has_help_and_a_variable():
    from dataclasses import fields

    for option in fields(Options):
        assert option.metadata["help"].endswith(".")
        assert env_name(option.name) == "GCU_COMPILE_" + option.name.upper()

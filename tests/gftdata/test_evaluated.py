"""What may go through `eval`: numbers, symbols, known functions, literals, and nothing that calls or names more."""

import pytest

from gftdata.evaluated import answer_is_harmless, entry_is_harmless, is_expression, is_literal


@pytest.mark.parametrize(
    "text", ["3*(4 - 1)", "x**2/2 + sin(3*x) + C", "1.5e3", "0x1f & ~3 << 2", "sqrt( 2 )", "", "a"]
)
def test_expressions(text: str) -> None:
    assert is_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "().__class__",
        "x.subs",
        "x. subs",
        "eval(1)",
        "S(1)",
        "(f)(1)",
        "f (1)",
        "'1'",
        "[1]",
        "{1}",
        "\\145",
        "lambda: 1",
        "x := 1",
        "\uff45(1)",
        "1;2",
        "@",
    ],
)
def test_no_expressions(text: str) -> None:
    assert not is_expression(text)


@pytest.mark.parametrize(
    ("text", "literal"),
    [
        ("[[1, 2], [3, 4]]", True),
        ("['a', 'b']", True),
        ("1 2 3", True),  # Python does not read it
        ("oracle_answer", False),
        ("[x for x in y]", False),
        ("print(1)", False),
        ("[" * 10_000, True),
    ],
)
def test_literals(text: str, literal: bool) -> None:
    assert is_literal(text) is literal


def test_what_a_task_evaluates_is_looked_at_and_nothing_else() -> None:
    assert answer_is_harmless("string_insertion", "ABC", "ABC") and not answer_is_harmless(
        "string_insertion", "AB", "ABC"
    )
    assert not answer_is_harmless("countdown", "eval(1)", "eval(1)")
    assert answer_is_harmless("basic_arithmetic", "eval(1)", "1")
    assert not entry_is_harmless("number_sorting", {"answer": "open('x')"})
    assert not entry_is_harmless("bitwise_arithmetic", {"metadata": {"problem": "open(1)"}})
    assert not entry_is_harmless("bitwise_arithmetic", {"metadata": {"problem": ["1"]}})
    assert entry_is_harmless(
        "intermediate_integration", {"answer": "Integral(x, x) + C", "metadata": {"integrand": "x"}}
    )
    assert not answer_is_harmless("intermediate_integration", "Integral(x, x)", "Integral(x, x)")

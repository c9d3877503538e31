"""Answers that are made to hurt whoever judges them, or to score without being right.

Each is `(ground truth, answer)`, and wrong under every reward that it is given to. What would fill a megabyte is made
here when it is asked for. `scored` names the rewards under which it counts as right by a convention that the test says.
"""

from collections.abc import Iterator

Nasty = tuple[str, str]
N = "7"  # of answers that only mean to hurt: nobody needs it


def powers() -> Iterator[Nasty]:
    """Numbers that have more digits than there is memory, and what takes as long to find."""
    for base, height in ((9, 4), (9, 7), (2, 9), (99, 5), (10, 30), (3, 200)):
        tower = "^{".join([str(base)] * height) + "}" * (height - 1)
        yield N, f"\\boxed{{{tower}}}"
        yield N, f"${tower}$"
        yield N, "**".join([str(base)] * height)
    for exponent in (9, 12, 99, 10**6):
        yield N, f"\\boxed{{10^{{{exponent}}}}}"
        yield N, f"\\boxed{{7^{{10^{{{exponent}}}}}}}"
        yield N, f"1e{exponent}"
        yield N, f"\\boxed{{2^{{-{exponent}}} \\cdot 9^{{{exponent}}}}}"
    for number in (10**3, 10**5, 10**9, 10**30):
        yield N, f"\\boxed{{{number}!}}"
        yield N, f"\\boxed{{({number}!)!}}"
        yield N, f"\\boxed{{\\binom{{{number}}}{{{number // 2}}}}}"
        yield N, f"\\boxed{{\\sum_{{k=1}}^{{{number}}} \\frac{{1}}{{k^k}}}}"
        yield N, f"\\boxed{{\\prod_{{k=1}}^{{{number}}} k^k}}"
        yield N, f"\\boxed{{\\sqrt[{number}]{{{number}}}}}"
    yield N, "\\boxed{\\int_0^\\infty \\frac{\\sin(x^{x^{x}})}{x^{99}+\\ln(\\cos x)} dx}"
    yield N, "\\boxed{\\lim_{x\\to 0} \\frac{\\sin(\\tan x)-\\tan(\\sin x)}{x^{77}}}"
    yield N, "\\boxed{\\sin(10^{10^{10}})}"
    yield N, "\\boxed{\\log_{10^{-99}}(9^{9^{9}})}"
    yield N, "\\boxed{" + "+".join(f"\\sqrt{{{n}}}" for n in range(2, 60)) + "}"
    yield N, "\\boxed{(a+b+c+d+e+f)^{400}}"
    yield N, "\\boxed{" + "".join(f"(x-{n})" for n in range(300)) + "}"
    yield N, "\\boxed{\\frac{d^{99}}{dx^{99}} e^{\\sin(x^2)}}"


def depths() -> Iterator[Nasty]:
    """Nesting, from what a parser still bears to what no stack does."""
    for depth in (30, 300, 3000, 100_000):
        for before, after in (
            ("{", "}"),
            ("(", ")"),
            ("\\left(", "\\right)"),
            ("\\frac{1}{", "}"),
            ("\\sqrt{", "}"),
            ("\\boxed{", "}"),
            ("\\text{", "}"),
            ("-", ""),
            ("x^{", "}"),
        ):
            yield N, "\\boxed{" + before * depth + "8" + after * depth + "}"
    for depth in (3000, 100_000):
        yield N, "\\boxed{" * depth
        yield N, "}" * depth + "\\boxed{8}"
        yield N, "$" * depth + "8"
        yield N, "[" * depth
        yield N, "\\begin{pmatrix}" * depth


def megabytes() -> Iterator[Nasty]:
    """Long strings, and those over which a regular expression would try everything twice."""
    million = 10**6
    for piece in ("8", "a", " ", "\n", "=", "1=", "9,", "\\", "{", "$ ", "\\boxed{8}", "8 ", "-", "1/", ".", "#### "):
        yield N, piece * (million // len(piece))
    for piece in ("answer is ", "\\frac", "\\boxed", "\\text{a}", "1,234,", "8 + ", "8^", "x_", "\u2212", "(8", "0.0"):
        yield N, "\\boxed{" + piece * (100_000 // len(piece)) + "}"
    for opening in ("\\boxed{", "$", "\\(", "\\[", "answer: ", "####"):
        yield N, opening + "8" * 300_000
        yield N, opening + " " * 300_000 + "8"
        yield N, (opening + "8\n") * 20_000
    yield N, "a" * 50_000 + "!" + "a" * 50_000
    yield N, "The final answer is " * 30_000 + "8"
    yield N, "1" + ",111" * 200_000


def latex() -> Iterator[Nasty]:
    """What would blow up in TeX itself, and environments that a parser may not know."""
    doubling = "".join(f"\\def\\{a}{{\\{b}\\{b}}}" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))
    yield N, doubling + "\\def\\k{8}\\boxed{\\a}"
    yield N, "\\loop\\iftrue\\repeat\\boxed{8}"
    yield N, "\\newcommand{\\x}{\\x\\x}\\boxed{\\x}"
    yield N, "\\boxed{\\input{/etc/passwd}}"
    yield N, "\\boxed{\\include{/dev/zero}}"
    yield N, "\\write18{touch pwned}\\boxed{8}"
    yield N, "\\csname\\endcsname\\boxed{8}"
    yield N, "\\catcode`\\{=12 \\boxed{8}"
    for name in ("matrix", "cases", "align", "array", "equation", "tikzpicture", "unknown"):
        yield N, f"\\boxed{{\\begin{{{name}}} 8 & 9 \\\\ 8 & 9 \\end{{{name}}}}}"
        yield N, f"\\boxed{{\\begin{{{name}}} 8"
        yield N, "\\boxed{\\begin{" + name + "}" + "8 & " * 3000 + "\\end{" + name + "}}"
    for command in (
        "\\frac{8}{0}",
        "\\frac{0}{0}",
        "\\sqrt{-1}",
        "\\log 0",
        "\\infty",
        "\\infty-\\infty",
        "\\nabla",
        "\\int",
    ):
        yield N, f"\\boxed{{{command}}}"


def code() -> Iterator[Nasty]:
    """What wants to be evaluated."""
    for source in (
        "__import__('os').system('touch pwned')",
        'exec(\'open("pwned", "w")\')',
        "eval('7')",
        "open('pwned', 'w').write('7')",
        "().__class__.__base__.__subclasses__()",
        "[x for x in ().__class__.__base__.__subclasses__() if 'Popen' in str(x)][0]('touch pwned', shell=True)",
        "lambda: 7",
        "f'{__import__(\"os\").getpid()}'",
        "globals()",
        "raise SystemExit(0)",
        "sys.exit()",
        "os._exit(0)",
        "while True: pass",
        "__builtins__",
        "prompt.ground_truth",
        "gold",
        "ground_truth",
        "{{ 7*1 }}",
        "{% for x in range(10**9) %}7{% endfor %}",
        "${jndi:ldap://127.0.0.1/a}",
        "$(touch pwned)",
        "`touch pwned`",
        "'; touch pwned; '",
        "<script>7</script>",
        "!!python/object/apply:os.system ['touch pwned']",
        "cos\nsystem\n(S'touch pwned'\ntR.",
        'S(\'__import__("os").system("touch pwned")\')',
        "Symbol('x', **{'a': 1})",
        "%s%s%s%n",
        "\x1b]0;title\x07\x1b[2J8",
    ):
        yield "12", source
        yield "12", f"\\boxed{{{source}}}"
        yield "12", f"\\boxed{{\\text{{{source}}}}}"


def unicode_tricks() -> Iterator[Nasty]:
    """Characters that look like what they are not."""
    for text in (
        "\u0664\u0663",
        "\uff14\uff13",
        "\u2074\u00b2",
        "4\u200b3",
        "\u202e42\u202c4",
        "4\u0332\u0333",
        "\u4e03",
        "\u2166",
        "\u2463",
        "\U0001d7d2\U0001d7d1",
        "4\x002",
        "\ufeff43",
        "4\u00a02",
        "\u00bd42",
        "42\u0307\u0307\u0307 3",
        "\u221e",
        "\u00b142",
        "42\u2070",
        "\u2260 42",
        "\u00ac42",
        "4\u02d92",
        "4\u066b2",
        "\U0001f4a9",
        "\u0000" * 1000,
        "e\u0301" * 20_000,
        "\u0928\u0940" * 20_000,
        "\U0001f468\u200d\U0001f469\u200d" * 10_000,
        "\ufdfa" * 50_000,
    ):
        yield "42", f"\\boxed{{{text}}}"
        yield "42", f"\\boxed{{x = {text}}}"


def hedges() -> Iterator[Nasty]:
    """More than one answer, none, or not that one."""
    for inside in (
        "41,42",
        "42,41",
        "41, 42, 43",
        ",".join(map(str, range(43))),
        "41 \\text{ or } 42",
        "42 \\text{ or } 41",
        "41 or 42",
        "x=41 or x=42",
        "x=41, x=42",
        "x_1=41,\\ x_2=42",
        "\\{41,42\\}",
        "[41,42]",
        "(41,42)",
        "[42,\\infty)",
        "41;42",
        "41/42",
        "41 \\vee 42",
        "41 \\lor 42",
        "41 \\cup 42",
        "\\{42, x\\}",
        "\\pm 42",
        "42 \\pm 1",
        "42 \\pm 100",
        "\\neq 42",
        "\\ne 42",
        "\\not= 42",
        "\\neg 42",
        "\\text{not } 42",
        "x \\neq 42",
        "> 42",
        "x < 42",
        "\\le 42",
        "\\geq 42",
        "0 < 42",
        "43 = 42",
        "41 = 43 = 42",
        "42 = 43",
        "42!",
        "42^2",
        "-42",
        "42 \\text{ thousand}",
        "42 million",
        "\\text{42 dozen}",
        "4200",
        "0.42",
        "42.4",
        "42.0001",
        "4 2",
        "",
        " ",
        "\\text{}",
        "\\emptyset",
        "\\{\\}",
        "\\text{nan}",
        "nan",
        "\\text{None}",
        "\\mathbb{R}",
        "\\text{all}",
        "any",
        "*",
        ".*",
        "?",
        "\\_",
        "42_{5}1",
        "\\overline{42}1",
        "\\text{forty-three}",
        "0x2A",
        "101010_2",
        "4\\cdot 2",
        "42\\cdot 2",
        "2 \\cdot 42",
        "42 + 42",
        "42-1",
        "42i",
        "\\sqrt{42}",
        "\\frac{42}{2}",
        "\\frac{1}{42}",
        "42^{-1}",
        "\\log 42",
    ):
        yield "42", f"The answer is \\boxed{{{inside}}}"
    for text in (
        "\\boxed{42} \\boxed{41}",
        "\\boxed{42}\\boxed{}41",
        "42 or 41",
        "42, 41",
        "#### 42\n#### 41",
        "\\boxed{41} #### 42",
        "\\boxed{41} and 42",
        "42 \\boxed{41}",
        "The answer is 42. No: the answer is 41.",
        "42\n" * 1000 + "41",
        "\\boxed{42}\n" * 1000 + "\\boxed{41}",
        "\\boxed{4}\\boxed{2}",
        "four two",
        "boxed",
        "\\boxed",
        "\\boxed{",
        "}{",
        "\\boxed{\\boxed{\\boxed{41}}} 42",
    ):
        yield "42", text
    for gold, text in (
        ("(0,1)", "\\boxed{[0,1]}"),
        ("[0,1]", "\\boxed{(0,1)}"),
        ("[0,1)", "\\boxed{(0,1]}"),
        ("(1,2)", "\\boxed{(2,1)}"),
        ("\\{1,2\\}", "\\boxed{\\{1,2,3\\}}"),
        ("\\{1,2\\}", "\\boxed{1}"),
        ("\\{1,2\\}", "\\boxed{\\{1\\}}"),
        ("(-\\infty,1)", "\\boxed{(-\\infty,1]}"),
        ("x<1", "\\boxed{x>1}"),
        ("x<1", "\\boxed{x\\le 1}"),
        ("x+1", "\\boxed{x}"),
        ("x+1", "\\boxed{x+2}"),
        ("x^2", "\\boxed{2x}"),
        ("\\sqrt{2}", "\\boxed{1.41}"),
        ("\\pi", "\\boxed{3.14}"),
        ("\\frac{1}{3}", "\\boxed{0.33}"),
        ("1,2", "\\boxed{1.2}"),
        ("1,2", "\\boxed{12}"),
        ("\\text{Sunday}", "\\boxed{\\text{Monday}}"),
        ("\\text{Sunday}", "\\boxed{\\text{Sunday or Monday}}"),
        ("\\text{even}", "\\boxed{\\text{odd}}"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{pmatrix}2\\\\1\\end{pmatrix}}"),
        ("2+3i", "\\boxed{2-3i}"),
        ("0", "\\boxed{\\frac{0}{0}}"),
        ("0", "\\boxed{}"),
        ("0", ""),
        ("1", "\\boxed{\\text{True}}"),
        ("1", "yes"),
    ):
        yield gold, text


def letters() -> Iterator[Nasty]:
    """For `choice`."""
    for text in (
        "A B C D",
        "\\boxed{A, B, C, D}",
        "\\boxed{B, A}",
        "\\boxed{B or A}",
        "\\boxed{B/A}",
        "\\boxed{B and C}",
        "\\boxed{\\text{B or C}}",
        "\\boxed{\\text{B}, \\text{C}}",
        "\\boxed{(B) (C)}",
        "\\boxed{(B), (C)}",
        "\\boxed{BC}",
        "\\boxed{}",
        "\\boxed{b}",
        "The answer is B or C",
        "The answer is B, C or D",
        "The answer is (B) or (C).",
        "The answer is B and C.",
        "The answer is **B**/**C**",
        "answer: B, C",
        "The answer is A. The answer is B? No, the answer is A.",
        "ABCDEFGHIJ",
        "\u0412",
        "\uff22",
        "\U0001d401",
        "B" * 100_000,
        "answer is " * 100_000,
        "A" + " B" * 100_000 + " A",
        "",
    ):
        yield "B", text


KINDS = (powers, depths, megabytes, latex, code, unicode_tricks, hedges)

"""A grammar that writes text: rules with alternatives, drawn at random.

Notation, in the files of `grammar/`:

    = name          starts a rule; each following line is one alternative
    = name |        the same, but a line holds several alternatives, separated by "|"
    # text          a comment
    [a|b|]          one of these (may be nested, may be empty)
    <name>          one alternative of the rule `name`
    {x}             the value bound to x
    {x=name}        draws from the rule `name` and binds the result to x
    {x:=text}       binds x to the text and writes nothing
    ¶               a new paragraph

The names within <> and {x=} may hold bindings themselves: <{place}.sound>.
"""

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

Rules = Mapping[str, tuple[str, ...]]
Binding = str | Callable[[], str]

CLOSING = {"[": "]", "<": ">", "{": "}"}


def read_rules(paths: Iterable[Path]) -> Rules:
    """All rules of the files. A name defined twice is an error, for one of the two would be lost."""
    rules: dict[str, list[str]] = {}
    for path in paths:
        alternatives: list[str] | None = None
        several_per_line = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            if line.startswith("= "):
                name = line[2:].removesuffix("|").strip()
                if name in rules:
                    raise ValueError(f"{path.name}:{number}: rule '{name}' is defined twice; rename one of them")
                several_per_line = line.endswith("|")
                alternatives = rules[name] = []
            elif alternatives is None:
                raise ValueError(f"{path.name}:{number}: text before the first rule; start one with '= name'")
            else:
                alternatives.extend(line.split("|") if several_per_line else [line])
    return {name: tuple(lines) for name, lines in rules.items()}


class Writer:
    """Writes one document. Within it no alternative repeats before the others of its rule have been used.

    `nats` sums the negative logarithm of the probability of each choice: the entropy that the grammar put into the
    text. No language model can do better than that (up to different choices that give the same text).
    """

    def __init__(self, rules: Rules, rng: random.Random, bindings: Mapping[str, Binding] | None = None) -> None:
        self.rules = rules
        self.rng = rng
        self.bindings: dict[str, Binding] = dict(bindings or {})
        self.nats = 0.0
        self._unused: dict[str, list[str]] = {}

    def write(self, template: str) -> str:
        """The finished text: expanded, with single spaces, capitals and the right indefinite articles."""
        return tidy(self.expand(template))

    def choose(self, options: list[str]) -> str:
        choice = self.rng.choice(options)
        self.nats += math.log(len(options) / options.count(choice))
        return choice

    def draw(self, rule: str) -> str:
        if rule not in self.rules:
            raise KeyError(f"no rule '{rule}' in the grammar; known: {', '.join(sorted(self.rules))}")
        unused = self._unused.get(rule) or list(self.rules[rule])
        choice = self.choose(unused)
        unused.remove(choice)
        self._unused[rule] = unused
        return self.expand(choice)

    def expand(self, template: str) -> str:
        parts: list[str] = []
        position = 0
        while position < len(template):
            char = template[position]
            if char not in CLOSING:
                parts.append(char)
                position += 1
                continue
            end = matching_bracket(template, position)
            inner = template[position + 1 : end]
            if char == "[":
                parts.append(self.expand(self.choose(split_choices(inner))))
            elif char == "<":
                parts.append(self.draw(self.expand(inner)))
            else:
                parts.append(self._binding(inner))
            position = end + 1
        return "".join(parts)

    def _binding(self, inner: str) -> str:
        if ":=" in inner:
            name, text = inner.split(":=", 1)
            self.bindings[name] = text
            return ""
        if "=" in inner:
            name, rule = inner.split("=", 1)
            self.bindings[name] = value = self.draw(self.expand(rule))
            return value
        bound = self.bindings.get(inner, self.bindings.get(inner.lower()))
        if bound is None:
            raise KeyError(f"'{{{inner}}}' is not bound; bound: {', '.join(sorted(self.bindings))}")
        return bound if isinstance(bound, str) else bound()


def matching_bracket(template: str, start: int) -> int:
    opening, closing = template[start], CLOSING[template[start]]
    depth = 0
    for position in range(start, len(template)):
        depth += (template[position] == opening) - (template[position] == closing)
        if depth == 0:
            return position
    raise ValueError(f"'{opening}' is never closed in: {template}")


def split_choices(text: str) -> list[str]:
    """Splits at the "|" that are not inside nested brackets."""
    choices, depth = [""], 0
    for char in text:
        depth += (char in CLOSING) - (char in CLOSING.values())
        if char == "|" and depth == 0:
            choices.append("")
        else:
            choices[-1] += char
    return choices


def tidy(text: str) -> str:
    text = re.sub(r" +", " ", text.replace("¶", "\n"))
    text = re.sub(r" ?\n ?", "\n", text).strip()
    text = re.sub(r" ([.,!?])", r"\1", text)
    text = re.sub(r"\b(\w+) \1\b", r"\1", text)  # two rules may meet on the same word: "slowly burned burned toast"
    text = re.sub(r"\b([Aa]) (?=[aeiou]|honest|hour)(?!one\b|uni|use)", r"\1n ", text)
    # A sentence starts with a capital: at the beginning, after a full stop (also one inside a closing quote), and in an
    # opening quote. After `?"` and `!"` the sentence usually goes on ("Why?" he asked), so the template must decide.
    text = re.sub(r"(^|\n)([\"]?)([a-z])", lambda m: m[1] + m[2] + m[3].upper(), text)
    text = re.sub(r"((?:[.!?]|\.\") \"?)([a-z])", lambda m: m[1] + m[2].upper(), text)
    return re.sub(r"((?:, |: |\n| )\")([a-z])", lambda m: m[1] + m[2].upper(), text)

r"""Recipes: which tensor becomes which type, as ``regex=type`` rules.

The language of the field: one rule a line, ``#`` comments, blank lines; the pattern is searched anywhere in the name and the
first rule that matches wins. ``custom="..."`` of a shell script, the argument of ``--custom-q`` (rules between commas) and
of ``--tensor-type`` (the last one wins) are read, too. Three things are our own::

    blk\..*\.ffn_down_exps\.weight=iq2_ks|q2_k    # the first type that the target holds
    blk\..*\.attn_.*\.weight=native               # the source's own bits, exactly; BF16 where the target lacks its type
    !blk\..*\.ffn_gate_inp\.weight=q8_0           # also tensors that otherwise stay as they are (see stays())
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from math import prod
from pathlib import Path
from typing import Final, Literal

from ggufx import mixes, types
from ggufx.errors import RecipeError, UnknownType

__all__ = [
    "NATIVE",
    "Finding",
    "Recipe",
    "Rule",
    "from_tensors",
    "lint",
    "load",
    "read_text",
    "shipped",
    "stays",
    "type_named",
]

NATIVE: Final = "native"
"""In place of a type: the source's own bits, exactly."""

_SUFFIX: Final = ".recipe"
_INTERLEAVED = re.compile(r"_R(4|8|16)$")
# Blanks of one line only: over line ends, a search for the start of a line is quadratic in the number of empty lines.
_ASSIGNMENT = re.compile(r"""^[ \t]*(?:export[ \t]+)?(\w+)=(["'])""", re.MULTILINE)
_NAMES = re.compile(r"\s*\w+\s*")
_COMMENT = re.compile(r"(^|\s)#.*$")
_ESCAPED_OR_UPPER = re.compile(r"\\.|[A-Z]")

MATCH_SECONDS: Final = 2.0
"""How long the pattern of one rule may take for all names together."""
_LONGEST_PATTERN: Final = 20_000
_MOST_RULES: Final = 20_000
# The regex package writes a counted repeat out, one within another as often as their product says.
_MOST_REPEATS: Final = 2_000
_COUNTED = re.compile(r"\{(\d*),?(\d*)\}")

# What no loader wants quantized, whatever its shape: names of upstream and of the forks.
_STAYS = re.compile(
    r"_norm\b|_norm_\d|ffn_gate_inp|exp_probs_b|tid2eid|\bhc_|_hc_|attn_sinks|_ape\b|indexer\.proj|indexer\.[kq]_proj"
    r"|^position_embd|^token_types|altup|laurel|per_layer_model_proj|ssm_conv1d|shortconv\.conv|attn_rel_b|time_mix_(first|lerp"
    r"|decay_w|[wvag]\d)|rope_freqs|rel_pos|patch_embd|patch_merger|position_embd|codebook|code_embd"
    r"|sam\.(pos_embd|neck\.|net_)"
)


def stays(name: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor stays as it is unless a rule names it with ``!``.

    Norms, biases, routers, hyper-connections, sinks and the like, and everything with one axis: together they are less than
    a thousandth of a model, and quality hangs on them.
    """
    return len(shape) < 2 or not name.endswith(".weight") or _STAYS.search(name) is not None


class Pattern:
    """A regular expression that is searched in names, for :data:`MATCH_SECONDS` in all.

    The expressions are those of the regex package: Python's own and POSIX classes such as ``[[:digit:]]``. It can be told to
    stop, which Python's cannot: a pattern such as ``(a+)+$`` takes time that doubles with every letter.

    Raises
    ------
    RecipeError
        The text is no regular expression, or too large to be one for names of tensors.
    """

    def __init__(self, text: str, origin: str = "") -> None:
        import regex  # 30 ms that `import ggufx` need not pay

        self.text, self.origin = text, origin
        self._left = MATCH_SECONDS
        where = f"{origin}: " if origin else ""
        if len(text) > _LONGEST_PATTERN:
            raise RecipeError(f"{where}the pattern has {len(text)} characters; at most {_LONGEST_PATTERN} are read")
        repeats = prod(max(1, *map(_count, match.groups())) for match in _COUNTED.finditer(text))
        if repeats > _MOST_REPEATS:
            raise RecipeError(
                f"{where}{_cut(text)!r} repeats something {repeats} times; names of tensors need no more than {_MOST_REPEATS} "
                "over all counts {n} of a pattern"
            )
        try:
            self._compiled = regex.compile(text)
        except (regex.error, OverflowError, RecursionError, ValueError) as error:
            raise RecipeError(f"{where}{_cut(text)!r} is not a regular expression: {error}") from None

    def search(self, name: str) -> bool:
        """Return whether the pattern is found in a name; raises RecipeError when all names together take too long."""
        start = time.thread_time()
        try:
            found = self._compiled.search(name, timeout=self._left) is not None
        except TimeoutError:
            where = f"{self.origin}: " if self.origin else ""
            raise RecipeError(
                f"{where}the pattern {_cut(self.text)!r} takes more than {MATCH_SECONDS:g} s to be matched against the "
                f"tensors' names ({name!r} was the last): repeats within repeats, such as (a+)+, try every way to share the "
                "letters; write a simpler one"
            ) from None
        spent = time.thread_time() - start
        # What takes microseconds may be asked for as often as one likes.
        if spent > 1e-3:
            self._left = max(1e-3, self._left - spent)
        return found


def _lower(match: re.Match[str]) -> str:
    return match[0] if match[0].startswith("\\") else match[0].lower()


def _count(digits: str) -> int:
    return int(digits[:9] or 0)  # longer ones are too large whatever follows


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes
    ----------
    pattern
        Regular expression of the regex package, searched anywhere in the name.
    types
        Upper-case type names, or :data:`NATIVE`; the first that the target holds is taken.
    force
        It was written with ``!``: tensors that otherwise stay as they are match, too.
    origin
        Where it stands, for messages.
    """

    pattern: str
    types: tuple[str, ...]
    force: bool = False
    origin: str = ""

    @cached_property
    def expression(self) -> Pattern:
        """The compiled pattern."""
        return Pattern(self.pattern, self.origin)

    def matches(self, name: str, *, stays: bool = False) -> bool:
        """Return whether the rule decides the tensor ``name``; raises RecipeError for a pattern that takes too long."""
        return (self.force or not stays) and self.expression.search(name)

    def __str__(self) -> str:
        return f"{'!' if self.force else ''}{self.pattern}={'|'.join(name.lower() for name in self.types)}"

    @property
    def label(self) -> str:
        """The rule and where it stands."""
        return f"{self.origin}: {self}" if self.origin else str(self)


@dataclass(frozen=True)
class Recipe:
    """Rules in order: the first that matches a tensor decides its type.

    Attributes
    ----------
    rules
    name
        What files made by it are called after.
    remarks
        What :meth:`text` says of the tensors that no rule is about, one comment a line.
    """

    rules: tuple[Rule, ...] = ()
    name: str = ""
    remarks: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return the name and the number of rules; :meth:`text` is the whole."""
        return f"<Recipe {self.name!r}: {len(self.rules)} rules>"

    def find(self, name: str, *, stays: bool = False) -> Rule | None:
        """Return the rule that decides tensor ``name``, or ``None``."""
        return next((rule for rule in self.rules if rule.matches(name, stays=stays)), None)

    def __add__(self, other: Recipe) -> Recipe:
        return Recipe(self.rules + other.rules, self.name or other.name)

    @classmethod
    def parse(cls, text: str, origin: str = "") -> Recipe:
        """Read a recipe's text, or a shell script that assigns one to a variable.

        Raises
        ------
        RecipeError
            A line is no rule, its pattern no regular expression, or its type unknown; names the line.
        """
        first, body = _assigned(text, origin)
        rules: list[Rule] = []
        for number, line in enumerate(body.split("\n"), first):
            bare = _COMMENT.sub("", line).strip()
            if bare:
                rules += _rules(bare, f"{origin} line {number}" if origin else f"line {number}")
                if len(rules) > _MOST_RULES:
                    raise RecipeError(
                        f"{rules[-1].origin}: more than {_MOST_RULES} rules; a model has far fewer tensors"
                    )
        return cls(tuple(rules))

    @classmethod
    def from_custom_q(cls, text: str, origin: str = "--custom-q") -> Recipe:
        """Read the argument of ``--custom-q``: rules between commas, the first one wins."""
        return cls(tuple(_rules(text.strip(), origin)) if text.strip() else ())

    @classmethod
    def from_tensor_types(cls, texts: Iterable[str], origin: str = "--tensor-type") -> Recipe:
        """Read arguments of ``--tensor-type``, or words of a ``--tensor-type-file``.

        As upstream has it, the last one wins, and patterns are made lower case.
        """
        rules = [rule for text in texts for rule in _rules(text.strip(), origin)]
        # But for what is escaped: \D means another thing than \d.
        lowered = [replace(rule, pattern=_ESCAPED_OR_UPPER.sub(_lower, rule.pattern)) for rule in rules]
        return cls(tuple(reversed(lowered)))

    def text(self) -> str:
        """Return the recipe as lines, as :meth:`parse` reads them."""
        return "".join([*(f"# {remark}\n" for remark in self.remarks), *(f"{rule}\n" for rule in self.rules)])

    def custom_q(self) -> str:
        """Return the argument of ik_llama.cpp's ``--custom-q``; raises RecipeError where it has no form for a rule."""
        for rule in self.rules:
            self._plain(rule, "--custom-q")
            if "," in rule.pattern or "=" in rule.pattern:
                raise RecipeError(
                    f"{rule.label}: --custom-q splits at every comma and the first '=', so a pattern with one cannot be written"
                )
        return ",".join(map(str, self.rules))

    def tensor_types(self) -> list[str]:
        """Return upstream's ``--tensor-type`` arguments, whose last match wins; raises RecipeError as :meth:`custom_q`."""
        for rule in self.rules:
            self._plain(rule, "--tensor-type")
        return [str(rule) for rule in reversed(self.rules)]

    @staticmethod
    def _plain(rule: Rule, form: str) -> None:
        if rule.force or len(rule.types) > 1 or rule.types[0] == NATIVE:
            raise RecipeError(
                f"{rule.label}: {form} has no form for '!', for alternatives and for {NATIVE!r}; name one type (see "
                "--target to choose among alternatives)"
            )

    def narrowed(self, holds: Mapping[str, bool]) -> Recipe:
        """Return the recipe with each rule's alternatives replaced by the first of which ``holds[type]`` is true."""
        rules = []
        for rule in self.rules:
            held = next((name for name in rule.types if name == NATIVE or holds.get(name)), rule.types[0])
            rules.append(replace(rule, types=(held,)))
        return Recipe(tuple(rules), self.name)


def _assigned(text: str, origin: str) -> tuple[int, str]:
    """Return (number of the first line, body): of the variable in a shell script that holds rules, or all of the text."""
    found = list(_ASSIGNMENT.finditer(text))
    for match in sorted(found, key=lambda match: match[1] != "custom"):
        end = text.find(match[2], match.end())
        if end < 0:
            line = text.count("\n", 0, match.start()) + 1
            raise RecipeError(f"{origin or 'recipe'} line {line}: {match[1]}={match[2]} is never closed")
        body = text[match.end() : end]
        # Other variables of the script hold paths and options.
        if match[1] == "custom" or ("\n" in body and "=" in body):
            return text.count("\n", 0, match.end()) + 1, body
    return 1, text


def _rules(text: str, origin: str) -> list[Rule]:
    """Split rules at commas: one without ``=`` belongs to the pattern that it stands in, as in ``a{1,3}``."""
    found: list[Rule] = []
    held = ""
    for piece in text.split(","):
        held = f"{held},{piece}" if held else piece
        if _ends_rule(piece):
            found.append(_rule(held.strip(), origin))
            held = ""
    if held.strip():
        raise RecipeError(f"{origin}: {held.strip()!r} is no rule; expected regex=type, such as ffn_down=iq4_ks")
    return found


def _ends_rule(text: str) -> bool:
    """Return whether what stands behind the last ``=`` are names of types."""
    _, equals, names = text.rpartition("=")
    return bool(equals) and all(_NAMES.fullmatch(name) for name in names.split("|"))


def _rule(text: str, origin: str) -> Rule:
    pattern, _, names = text.rpartition("=")
    pattern = pattern.strip()
    force = pattern.startswith("!")
    pattern = pattern.removeprefix("!").strip()
    if not pattern:
        raise RecipeError(f"{origin}: {text!r} has no pattern before the '='")
    # An alternative named twice is the same one.
    kinds = dict.fromkeys(type_named(name, origin, text) for name in dict.fromkeys(names.split("|")))
    rule = Rule(pattern, tuple(kinds), force, origin)
    _ = rule.expression  # read now, so that the error names the line
    return rule


def type_named(text: str, origin: str, rule: str = "", others: Iterable[str] = ()) -> str:
    """Return upstream's spelling of a type, or :data:`NATIVE`; ``others`` are names that could stand there, too.

    Raises RecipeError, told where the name stands and, if in one, the rule; it also knows mixes and interleaved types.
    """
    name, where = text.strip(), f" in custom quantization input {rule!r}" if rule else ""
    if name.lower() == NATIVE:
        return NATIVE
    if _INTERLEAVED.search(name.upper()):
        raise RecipeError(
            f"{origin}: {name!r}{where} is an interleaved type, made for one kind of CPU; quantize to "
            f"{_INTERLEAVED.sub('', name.upper())}, which ik_llama.cpp repacks when it loads the model (-rtr)"
        )
    try:
        return types.get(name).name
    except UnknownType:
        close = _close(name, others)
        raise RecipeError(
            f"{origin}: Invalid quantization type {name!r}{where}"
            + (f"; did you mean {close}?" if close else "; see `ggufx types`")
        ) from None


def _close(name: str, others: Iterable[str] = ()) -> str:
    mix = mixes.find(name)
    if mix is not None:
        return (
            f"{mix.type} ({name} is a mix of types: `ggufx recipe show {mix.name} --for MODEL` writes it out as rules)"
        )
    return types.close(name, others)


# Files ----------------------------------------------------------------------------------------------------------


def shipped() -> dict[str, str]:
    """Return the recipes that come with ggufx: name -> text."""
    folder = resources.files("ggufx") / "recipes"
    found = {p.name.removesuffix(_SUFFIX): p for p in folder.iterdir() if p.name.endswith(_SUFFIX)}
    return {name: found[name].read_text(encoding="utf-8") for name in sorted(found)}


def read_text(path: Path) -> str:
    """Return the text of a file of rules, without the byte order mark that some editors put first.

    Raises
    ------
    RecipeError
        It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not a text file (byte {error.start} is not UTF-8)") from None


def load(name: str | Path) -> Recipe:
    """Read a recipe file, or a shipped recipe by its name.

    Raises
    ------
    RecipeError
        There is neither, or it is damaged.
    """
    path = Path(name)
    if path.is_file():
        return replace(Recipe.parse(read_text(path), str(path)), name=path.name.removesuffix(_SUFFIX))
    ours = shipped()
    key = str(name).removesuffix(_SUFFIX)
    if key in ours:
        return replace(Recipe.parse(ours[key], key), name=key)
    what = "is a directory" if path.is_dir() else "is no file"
    raise RecipeError(f"{name}: {what}, and no recipe of that name comes with ggufx; these do: {', '.join(ours)}")


# From an existing file ------------------------------------------------------------------------------------------

_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)$")
_PLAIN: Final = frozenset({"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"})


def from_tensors(tensors: Iterable[tuple[str, Sequence[int], str]]) -> Recipe:
    """Return a recipe that gives each of the tensors the type it has.

    Parameters
    ----------
    tensors
        (name, shape, type name). Tensors that stay as they are get a rule only where their type is a quantized one. A type
        without a codec has no rule, and no other rule matches its tensors: the recipe's remarks name them.
    """
    families: dict[str, dict[int | None, str]] = {}
    without: dict[str, list[str]] = {}
    open_families: set[str] = set()
    forced: set[str] = set()
    default: dict[str, bool] = {}
    for name, shape, kind in tensors:
        match = _BLOCK.match(name)
        rest, layer = (match[2], int(match[1])) if match else (name, None)
        if not _has_codec(kind):
            without.setdefault(kind, []).append(name)
            open_families.add(rest)
            continue
        families.setdefault(rest, {})[layer] = kind
        stay = stays(name, shape)
        if stay:
            forced.add(rest)
        default[rest] = default.get(rest, True) and stay and kind in _PLAIN
    rules: list[Rule] = []
    for rest, layers in families.items():
        if default[rest]:
            continue
        counts = Counter(layers.values()).most_common()
        for kind, _ in reversed(counts):
            numbers = sorted(layer for layer, held in layers.items() if held == kind and layer is not None)
            prefixes = ["^"] if layers.get(None) == kind else []
            if numbers and kind == counts[0][0] and rest not in open_families:
                prefixes.append(r"^blk\.\d+\.")
            elif numbers:
                prefixes.append(rf"^blk\.({'|'.join(map(str, numbers))})\.")
            rules += [Rule(f"{prefix}{re.escape(rest)}$", (kind,), rest in forced) for prefix in prefixes]
    remarks = tuple(
        f"no rule for {_some(names, 4)}: ggufx cannot make {kind}, and no rule below matches them"
        for kind, names in without.items()
    )
    return Recipe(tuple(rules), remarks=remarks)


def _has_codec(kind: str) -> bool:
    try:
        types.get(kind)
    except UnknownType:
        return False
    return True


# The linter -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Something to know before any work.

    Attributes
    ----------
    severity
        ``error``: nothing will be written; ``warning``: probably not what was meant; ``note``: a choice that was made.
    code
        Stable short name, for programs.
    message
        One sentence.
    tensors
        Names it is about.
    """

    severity: Literal["error", "warning", "note"]
    code: str
    message: str
    tensors: tuple[str, ...] = ()


def lint(recipe: Recipe, names: Mapping[str, bool]) -> list[Finding]:
    """Find rules that do not do what they say.

    Parameters
    ----------
    recipe
        The rules.
    names
        Tensor name -> whether it stays as it is.

    Returns
    -------
    list of Finding
        Rules that match nothing, only tensors that stay as they are, or only what earlier rules took; dots that match
        more than a dot.
    """
    found: list[Finding] = []
    winners = {name: recipe.find(name, stays=stay) for name, stay in names.items()}
    for rule in recipe.rules:
        reach = [name for name in names if rule.expression.search(name)]
        decided = [name for name in reach if rule.matches(name, stays=names[name])]
        won = [name for name in decided if winners[name] is rule]
        if not reach:
            found.append(Finding("warning", "matches-nothing", f"{rule.label} matches no tensor"))
        elif not decided:
            found.append(
                Finding(
                    "warning", "stays",
                    f"{rule.label} matches only tensors that stay as they are ({_some(reach)}); write !{rule.pattern} if they "
                    "shall not", tuple(reach),
                )
            )  # fmt: skip
        elif not won:
            takers = dict.fromkeys(str(winner.label) for name in decided if (winner := winners[name]) is not None)
            found.append(
                Finding(
                    "warning", "shadowed",
                    f"{rule.label} never decides: its {len(decided)} tensors ({_some(decided)}) are taken by earlier rules "
                    f"({'; '.join(takers)})", tuple(decided),
                )
            )  # fmt: skip
        strict = Pattern(_dots_escaped(rule.pattern), rule.origin)
        loose = [name for name in won if not strict.search(name)]
        if loose:
            found.append(
                Finding(
                    "warning", "unescaped-dot",
                    f"{rule.label} matches {_some(loose)} only because an unescaped '.' is any character; write \\. for a dot",
                    tuple(loose),
                )
            )  # fmt: skip
    return found


def _some(names: Sequence[str], count: int = 2) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _dots_escaped(pattern: str) -> str:
    r"""Return the pattern with every lone ``.`` as ``\.``: not in classes, and not before a quantifier, where it is meant."""
    out: list[str] = []
    in_class = False
    position = 0
    while position < len(pattern):
        char = pattern[position]
        if char == "\\":
            out.append(pattern[position : position + 2])
            position += 2
            continue
        if char == "[" and not in_class:
            in_class = True
        elif char == "]" and in_class:
            in_class = False
        lone = char == "." and not in_class and pattern[position + 1 : position + 2] not in ("*", "+", "?", "{")
        out.append("\\." if lone else char)
        position += 1
    return "".join(out)

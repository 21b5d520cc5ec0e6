"""Recipes of strangers: patterns and texts that would take for ever, upper case, POSIX classes; and recipes of odd files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufx import recipe as recipe_module
from ggufx.container import align_up, encode_header
from ggufx.errors import RecipeError
from ggufx.recipe import Recipe, from_tensors

NAMES = {f"blk.{layer}.ffn_{part}_exps.weight": False for layer in range(61) for part in ("gate", "up", "down")}


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


@pytest.mark.parametrize("text", ["\n" * 40_000, "# comment\n" * 40_000, "a=" + "q8_0|" * 40_000 + "q8_0"])
def test_large_texts_are_read_in_no_time(text: str) -> None:
    assert seconds(lambda: Recipe.parse(text)) < 1


def test_a_name_that_is_given_again_is_one_alternative() -> None:
    (rule,) = Recipe.parse("a=q8_0|q8_0|Q8_0|q4_k").rules
    assert rule.types == ("Q8_0", "Q4_K")


def test_more_rules_than_tensors_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"line 20001: more than 20000 rules"):
        Recipe.parse("a=q8_0\n" * 20_001)


@pytest.mark.parametrize("pattern", [r"(\w+\.?)+(\w+\.?)+(\w+\.?)+(\w+\.?)+(\w+\.?)+[A-Z]"])
def test_a_catastrophic_pattern_is_stopped_and_its_line_named(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_module, "MATCH_SECONDS", 0.2)
    rules = Recipe.parse(f"# two lines\nattn=q8_0\n{pattern}=q4_0\n", "bad.recipe")
    start = time.process_time()
    with pytest.raises(RecipeError, match=r"bad\.recipe line 3: the pattern .* takes more than 0\.2 s"):
        recipe_module.lint(rules, NAMES)
    assert time.process_time() - start < 2


def test_many_slow_searches_share_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_module, "MATCH_SECONDS", 0.2)
    rules = Recipe.parse(r"(\w+\.?){1,9}(\w+\.?){1,9}(\w+\.?){1,9}[A-Z]=q4_0")
    names = {f"{'ab' * length}.{number}": False for number in range(500) for length in (6, 7, 8)}
    start = time.process_time()
    with pytest.raises(RecipeError, match="takes more than"):
        recipe_module.lint(rules, names)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "pattern", ["((((a?){1000}){1000}){1000}){1000}", "(a{2,60}){2,60}", "x{99999999999999999999}"]
)
def test_counts_that_take_memory_are_refused(pattern: str) -> None:
    with pytest.raises(RecipeError, match=r"line 1: .* repeats something \d+ times"):
        Recipe.parse(f"{pattern}=q4_0")


def test_a_pattern_longer_than_any_use_is_refused() -> None:
    with pytest.raises(RecipeError, match="has 20001 characters"):
        Recipe.parse(f"{'a' * 20_001}=q4_0")


def test_posix_classes_and_lookaheads_are_understood() -> None:
    rules = Recipe.parse("blk\\.[[:digit:]]+\\.ffn_up=q4_k\nblk\\.(?!0)\\d+\\.ffn_gate=q5_k\n")
    found = {name: rule and rule.types[0] for name in NAMES if (rule := rules.find(name)) or True}
    assert found["blk.12.ffn_up_exps.weight"] == "Q4_K"
    assert found["blk.12.ffn_gate_exps.weight"] == "Q5_K"
    assert found["blk.0.ffn_gate_exps.weight"] is None


def test_tensor_type_patterns_are_made_lower_case_as_upstream_does() -> None:
    rules = Recipe.from_tensor_types([r"ATTN_Q\.=q8_0", r"blk\.\D+\.=q4_k"])
    assert [rule.pattern for rule in rules.rules] == [r"blk\.\D+\.", r"attn_q\."]
    rule = rules.find("blk.3.attn_q.weight")
    assert rule is not None
    assert rule.types == ("Q8_0",)
    assert Recipe.parse("ATTN_Q=q8_0").find("blk.3.attn_q.weight") is None  # only that option is so


# From files with types that have no codec -----------------------------------------------------------------------------


def test_tensors_without_a_codec_are_named_and_no_rule_is_theirs() -> None:
    kinds = ["Q4_K", "IQ4_K_R4 (id 339)", "Q4_K", "IQ4_KT", "id 999", "Q4_K"]
    tensors = [(f"blk.{n}.ffn_down_exps.weight", (2, 4, 256), kind) for n, kind in enumerate(kinds)]
    tensors += [("output.weight", (8, 256), "Q6_K"), ("blk.1.attn_norm.weight", (256,), "F32")]
    rules = from_tensors(tensors)
    for name, shape, kind in tensors:
        rule = rules.find(name, stays=recipe_module.stays(name, shape))
        if kind in ("Q4_K", "IQ4_KT", "Q6_K"):
            assert rule is not None
            assert rule.types == (kind,)
        else:
            assert rule is None, name
    assert rules.text().splitlines()[:2] == [
        "# no rule for blk.1.ffn_down_exps.weight: ggufx cannot make IQ4_K_R4 (id 339), and no rule below matches them",
        "# no rule for blk.4.ffn_down_exps.weight: ggufx cannot make id 999, and no rule below matches them",
    ]
    assert [str(rule) for rule in Recipe.parse(rules.text()).rules] == [str(rule) for rule in rules.rules]


def test_the_command_prints_the_remarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ggufx import cli

    tensors = [(339, 4 * 144), (12, 4 * 144), (0, 32)]
    directory, data = [], b""
    for layer, (type_id, nbytes) in enumerate(tensors):
        shape = (8,) if type_id == 0 else (4, 256)
        directory.append((f"blk.{layer}.ffn_down.weight", shape, type_id, len(data)))
        data += bytes(align_up(nbytes, 32))
    path = tmp_path / "r4.gguf"
    path.write_bytes(encode_header({}, directory, 32) + data)
    cli.recipe_from_gguf(path)
    lines = capsys.readouterr().out.splitlines()
    assert "# no rule for blk.0.ffn_down.weight: ggufx cannot make IQ4_K_R4 (id 339)" in lines[1]
    assert r"^blk\.(1)\.ffn_down\.weight$=q4_k" in [line.lstrip("!") for line in lines]

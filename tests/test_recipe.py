"""The recipe language: what the field writes is read as the field's tools read it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufx import recipe, types
from ggufx.errors import PlanError, RecipeError
from ggufx.recipe import Recipe, Rule

NAMES = [
    "token_embd.weight", "output.weight", "output_norm.weight",
    *(f"blk.{layer}.{rest}" for layer in range(12) for rest in (
        "attn_norm.weight", "attn_q.weight", "attn_output.weight", "attn_k_b.weight", "ffn_gate_inp.weight",
        "ffn_down_exps.weight", "ffn_up_exps.weight", "exp_probs_b.bias",
    )),
]  # fmt: skip


def types_of(rules: Recipe) -> dict[str, str]:
    """Type of every name by the rules, protection aside."""
    return {name: rule.types[0] for name in NAMES if (rule := rules.find(name)) is not None}


SCRIPT = r"""#!/usr/bin/env bash
model="/mnt/models/x.gguf"
custom="
# Attention
blk\..*\.attn_k_b\.weight=q4_0
blk\..*\.attn_.*=IQ4_KS

# Experts, first layers
blk\.[0-2]\.ffn_down_exps\.weight=iq3_ks
blk\..*\.ffn_down_exps\.weight=iq2_ks
blk\..*\.ffn_(gate|up)_exps\.weight=iq2_xxs
token_embd\.weight=iq4_k
output\.weight=iq5_k
"

custom=$(
  echo "$custom" | grep -v '^#' | \
  sed -Ez 's:\n+:,:g;s:,$::;s:^,::'
)
numactl -N 0 ./build/bin/llama-quantize --custom-q "$custom" --imatrix "$model" IQ2_KS 24
"""


def test_the_fields_script_is_read_as_it_is() -> None:
    rules = Recipe.parse(SCRIPT, "quantize.sh")
    assert len(rules.rules) == 7
    found = types_of(rules)
    assert found["blk.3.attn_k_b.weight"] == "Q4_0"
    assert found["blk.3.attn_q.weight"] == "IQ4_KS"
    assert found["blk.2.ffn_down_exps.weight"] == "IQ3_KS"
    assert found["blk.10.ffn_down_exps.weight"] == "IQ2_KS"
    assert found["blk.0.ffn_up_exps.weight"] == "IQ2_XXS"
    # The search is unanchored and the first rule wins: attn_output.weight was taken before output.weight could.
    assert found["output.weight"] == "IQ5_K"
    assert found["blk.0.attn_output.weight"] == "IQ4_KS"
    assert rules.rules[3].origin == "quantize.sh line 10"


def test_an_earlier_unanchored_rule_swallows_as_in_ik_llama_cpp() -> None:
    rules = Recipe.from_custom_q(r"output\.weight=iq6_k,blk\..*\.attn_output\.weight=iq4_k")
    assert types_of(rules)["blk.1.attn_output.weight"] == "IQ6_K"
    (finding,) = recipe.lint(rules, dict.fromkeys(NAMES, False))
    assert finding.code == "shadowed"
    assert "output\\.weight=iq6_k" in finding.message


def test_tensor_type_keeps_upstreams_last_wins() -> None:
    rules = Recipe.from_tensor_types(["ffn_.*=q4_k", "ffn_down_exps=q6_k"])
    assert types_of(rules)["blk.0.ffn_down_exps.weight"] == "Q6_K"
    assert types_of(rules)["blk.0.ffn_up_exps.weight"] == "Q4_K"
    assert rules.tensor_types() == ["ffn_.*=q4_k", "ffn_down_exps=q6_k"]


def test_commas_and_equal_signs_inside_a_pattern() -> None:
    rules = Recipe.from_custom_q("blk\\.\\d{1,2}\\.attn_(q,|q)=q4_0,(?=out)output=q8_0")
    assert [rule.pattern for rule in rules.rules] == ["blk\\.\\d{1,2}\\.attn_(q,|q)", "(?=out)output"]
    for rule in rules.rules:
        with pytest.raises(RecipeError, match="splits at every comma"):
            Recipe((rule,)).custom_q()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attn_q", "line 1: 'attn_q' is no rule"),
        ("\n\nattn_q=", "line 3: 'attn_q=' is no rule"),
        ("=q4_0", "no pattern before"),
        ("!=q4_0", "no pattern before"),
        ("(=q4_0", "is not a regular expression"), ("a{99999999999}=q4_0", "repeats something 999999999 times"),
        ("a=q4_k_m", "Invalid quantization type 'q4_k_m'.*Q4_K"),
        ("a=iq4_kz", "Invalid quantization type 'iq4_kz' in custom quantization input 'a=iq4_kz'; did you mean IQ4_K"),
        ("a=zzz", "Invalid quantization type 'zzz'.*ggufx types"),
        ("a=iq4_k_r4", "interleaved.*IQ4_K"),
        ("a=q4_0|zzz", "Invalid quantization type 'zzz'"),
        ('custom="\na=q4_0\n', "never closed"),
    ],
)  # fmt: skip
def test_damaged_rules_name_the_line_and_the_cure(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(text)


def test_comments_blank_lines_and_cases() -> None:
    text = "# head\n\n  ffn_up = Q4_K   # why\n!ffn_gate_inp=NATIVE\nffn_down=iq2_ks|Q2_K\n"
    rules = Recipe.parse(text)
    assert [(r.pattern, r.types, r.force) for r in rules.rules] == [
        ("ffn_up", ("Q4_K",), False), ("ffn_gate_inp", ("native",), True), ("ffn_down", ("IQ2_KS", "Q2_K"), False),
    ]  # fmt: skip
    assert Recipe.parse(rules.text()).text() == rules.text()


def test_exclamation_mark_reaches_what_stays() -> None:
    plain, forced = Recipe.parse(".*=q4_0"), Recipe.parse("!gate_inp=q8_0\n.*=q4_0")
    assert plain.find("blk.0.ffn_gate_inp.weight", stays=True) is None
    assert forced.find("blk.0.ffn_gate_inp.weight", stays=True) is forced.rules[0]
    assert forced.find("blk.0.ffn_up.weight") is forced.rules[1]


@pytest.mark.parametrize(
    ("name", "shape", "stay"),
    [
        ("blk.0.attn_norm.weight", (64,), True), ("blk.0.attn_q.bias", (4, 64), True),
        ("blk.0.ffn_gate_inp.weight", (8, 64), True), ("blk.0.exp_probs_b.bias", (8,), True), ("hc_head_fn", (4, 64), True),
        ("blk.1.hc_attn_fn.weight", (4, 64), True), ("output_hc_fn.weight", (4, 64), True),
        ("blk.0.attn_compressor_ape.weight", (4, 64), True), ("blk.0.attn_compress_ape", (4, 64), True),
        ("blk.0.indexer.proj.weight", (4, 64), True), ("blk.0.indexer.attn_q_b.weight", (4, 64), False),
        ("blk.0.ffn_gate_tid2eid.weight", (4, 64), True), ("blk.0.attn_q.weight", (64, 64), False),
        ("token_embd.weight", (64, 64), False), ("output.weight", (64, 64), False), ("blk.0.attn_q.weight", (64,), True),
        ("blk.0.ffn_norm_exps.weight", (8, 64), False), ("blk.0.attn_q_a_norm.weight", (8, 64), True),
        ("blk.0.ssm_conv1d.weight", (8, 64), True), ("blk.0.ffn_down_exps.weight", (2, 8, 64), False),
    ],
)  # fmt: skip
def test_what_stays(name: str, shape: tuple[int, ...], stay: bool) -> None:
    assert recipe.stays(name, shape) is stay


# The linter ---------------------------------------------------------------------------------------------------------


def codes(text: str, stays: tuple[str, ...] = ()) -> dict[str, str]:
    """Finding code -> message."""
    found = recipe.lint(Recipe.parse(text), {name: name.endswith(stays) if stays else False for name in NAMES})
    return {finding.code: finding.message for finding in found}


def test_lint_finds_nothing_in_a_clean_recipe() -> None:
    assert codes(r"^blk\.\d+\.attn_.*\.weight$=q4_0") == {}


def test_lint_unmatched() -> None:
    assert "blk\\.99" in codes(r"blk\.99\.=q4_0")["matches-nothing"]


def test_lint_shadowed_only_when_wholly() -> None:
    assert codes("blk\\.1\\.attn_q=q4_0\nattn_q=q8_0") == {}
    assert "line 1" in codes("attn_q=q4_0\nblk\\.1\\.attn_q=q8_0")["shadowed"]


def test_lint_dots_that_matter() -> None:
    found = codes(r"blk\.1.\.attn_q=q4_0")
    assert "blk.10.attn_q.weight" in found["unescaped-dot"]
    assert codes(r"blk.1.attn_q=q4_0") == {}  # sloppy, but it takes nothing more
    assert codes(r"blk\.1[.]attn_q.*=q4_0") == {}


def test_lint_names_what_stays() -> None:
    found = codes("ffn_gate_inp=q8_0", stays=("gate_inp.weight",))
    assert "!ffn_gate_inp" in found["stays"]


# Forms --------------------------------------------------------------------------------------------------------------


def test_forms_agree() -> None:
    rules = Recipe.parse(SCRIPT)
    assert types_of(Recipe.from_custom_q(rules.custom_q())) == types_of(rules)
    assert types_of(Recipe.from_tensor_types(rules.tensor_types())) == types_of(rules)
    assert types_of(Recipe.parse(rules.text())) == types_of(rules)


@pytest.mark.parametrize("text", ["!a=q4_0", "a=native", "a=iq2_ks|q2_k"])
def test_forms_without_a_spelling_say_so(text: str) -> None:
    rules = Recipe.parse(text)
    for write in (rules.custom_q, rules.tensor_types):
        with pytest.raises(RecipeError, match="has no form for"):
            write()


def test_narrowed_takes_the_first_alternative_that_is_held() -> None:
    rules = Recipe.parse("a=iq2_ks|q2_k\nb=native|q4_0\nc=iq5_k")
    held = {"Q2_K": True, "Q4_0": True}
    assert [rule.types for rule in rules.narrowed(held).rules] == [("Q2_K",), ("native",), ("IQ5_K",)]


KINDS = ["Q4_0", "Q6_K", "IQ2_KS", "BF16", "F32"]


@given(st.lists(st.sampled_from(KINDS), min_size=len(NAMES), max_size=len(NAMES)))
def test_a_recipe_read_off_a_file_gives_each_tensor_its_type(kinds: list[str]) -> None:
    tensors = [(name, (64, 64), kind) for name, kind in zip(NAMES, kinds, strict=True)]
    rules = recipe.from_tensors(tensors)
    for name, shape, kind in tensors:
        stay = recipe.stays(name, shape)
        rule = rules.find(name, stays=stay)
        if stay and kind in ("F32", "BF16"):
            assert rule is None or rule.types == (kind,)
        else:
            assert rule is not None
            assert rule.types == (kind,)
    assert recipe.lint(rules, {name: recipe.stays(name, shape) for name, shape, _ in tensors}) == []


# Shipped ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe.shipped())
def test_shipped_recipes_parse_and_name_types_that_can_be_made(name: str) -> None:
    rules = recipe.load(name)
    assert rules.name == name
    for rule in rules.rules:
        assert all(kind == recipe.NATIVE or types.get(kind).can_encode for kind in rule.types)
        assert re.compile(rule.pattern)


def test_load_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="deepseek-v4-flash-iq2_xxs"):
        recipe.load("no-such-recipe")
    with pytest.raises(RecipeError, match="is a directory"):
        recipe.load(tmp_path)
    path = tmp_path / "a.recipe"
    path.write_bytes(b"\xff\xfe=q4_0")
    with pytest.raises(RecipeError, match="not UTF-8"):
        recipe.load(path)
    path.write_text("ffn=q4_0\nx=nope\n")
    with pytest.raises(RecipeError, match=r"a\.recipe line 2"):
        recipe.load(path)


def test_a_byte_order_mark_and_dos_lines_are_no_part_of_a_rule(tmp_path: Path) -> None:
    path = tmp_path / "a.recipe"
    for text in ("attn_q=q4_0\r\nffn_.*=q8_0\r\n", "# head\r\nattn_q=q4_0\r\n\r\nffn_.*=q8_0\r\n"):
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert recipe.load(path).text() == "attn_q=q4_0\nffn_.*=q8_0\n"


def test_rules_print_as_they_are_read() -> None:
    rule = Rule("a", ("IQ2_KS", "native"), force=True, origin="x line 1")
    assert str(rule) == "!a=iq2_ks|native"
    assert rule.label == "x line 1: !a=iq2_ks|native"

"""Every value that is read from a file, of every type there is: it is understood, or one error of ours says what is wrong.

The planners run in this process on the smallest checkpoints and on GGUFs of both forms of DeepSeek-V4. What is read from
config.json is not listed here: a dict that notes its keys tells, so that a key that a later change reads is tried, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufx
from ggufx import execute
from ggufx.checkpoint import Checkpoint
from ggufx.container import Value, ValueType
from ggufx.convert import TARGETS, convert, plan_convert
from ggufx.errors import GGUFError
from ggufx.export import plan_export
from ggufx.file import File
from ggufx.quantize import plan_quantize
from ggufx.retarget import plan_retarget

JSON: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**32, 2**63, 2**64, 10**400, -(10**30), 0.0, 0.5, -1.5, 1e-300, 1e308,
    math.nan, math.inf, -math.inf, "", "x", "yarn", "1", "\ud800", "\x1b[2J", [], [0], [1, 2], [-1], [None], [True],
    ["a"], ["a", 1], [[1]], [math.nan], [{}], {}, {"a": 1}, {"a": {"b": [1]}}, {"main": {}, "compress": {}}, {"": None},
]  # fmt: skip
EXTREMES = {
    kind: [info.min, 1, info.max]
    for kind, dtype in {
        ValueType.UINT8: "u1", ValueType.INT8: "i1", ValueType.UINT16: "u2", ValueType.INT16: "i2",
        ValueType.UINT32: "u4", ValueType.INT32: "i4", ValueType.UINT64: "u8", ValueType.INT64: "i8",
    }.items()
    for info in [np.iinfo(dtype)]
} | {
    ValueType.FLOAT32: [0.5, math.nan, math.inf], ValueType.FLOAT64: [0.5, 1e308, -math.inf],
    ValueType.BOOL: [False, True], ValueType.STRING: ["", "x", "\x1b[2J"],
}  # fmt: skip
METADATA: list[Value | None] = [
    None,  # the key is gone
    *(Value(kind, int(v) if isinstance(v, np.integer) else v) for kind, items in EXTREMES.items() for v in items),
    *(Value.array(kind, items[:count]) for kind, items in EXTREMES.items() for count in (0, 1, 2)),
]


def sampled(keys: Sequence[Any], values: Sequence[Any], every: bool) -> Iterator[tuple[Any, Any]]:
    """Every key with every value, or with a few of them: each key begins at another place of the list."""
    for number, key in enumerate(keys):
        step = 1 if every else 29
        yield from ((key, value) for value in values[number % step :: step])


def shown(value: object) -> str:
    return repr(value)[:60]


def problem(run: Callable[[], object]) -> str:
    """What is wrong with an outcome: anything but success or one error of ours that is no longer than a screen."""
    try:
        run()
    except GGUFError as error:
        text = str(error)
        return "" if len(text) < 1000 and "\n" not in text else f"error of {len(text)} letters: {text[:100]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return ""


# config.json and generation_config.json -----------------------------------------------------------------------------


class Noting(dict[str, Any]):
    """A JSON object that notes the paths of keys that are asked for, its own objects' too."""

    def __init__(self, values: dict[str, Any], noted: dict[tuple[str, ...], None], path: tuple[str, ...] = ()) -> None:
        super().__init__({
            key: Noting(value, noted, (*path, key)) if isinstance(value, dict) else value for key, value in values.items()
        })  # fmt: skip
        self.noted, self.path = noted, path

    def get(self, key: str, default: Any = None) -> Any:
        self.noted[*self.path, key] = None
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.noted[*self.path, key] = None
        return super().__getitem__(key)


def make(family: str, path: Path) -> None:
    from make_tiny_gpt_oss import make_tiny_gpt_oss
    from make_tiny_v3 import make_tiny_v3
    from make_tiny_v4 import make_tiny_v4

    if family == "deepseek_v4":
        make_tiny_v4(
            path,
            layers=3,
            hash_layers=1,
            hidden=128,
            experts=6,
            heads=2,
            merges=40,
            moe=128,
            head_dim=128,
            index_heads=4,
        )
    elif family == "deepseek_v3":
        make_tiny_v3(
            path, layers=2, hidden=128, ffn=128, moe=128, experts=4, groups=2, top_groups=1, heads=2, q_lora=128,
            kv_lora=128, nope=64, value=64, merges=40, shards=1,
        )  # fmt: skip
    else:
        make_tiny_gpt_oss(
            path, layers=2, hidden=64, inter=64, experts=4, heads=2, kv_heads=1, head_dim=32, merges=40, shards=1
        )


@pytest.fixture(scope="module", params=["deepseek_v4", "deepseek_v3", "gpt_oss"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("values") / "Tiny"
    make(request.param, path)
    return Checkpoint(path)


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of a JSON object with one value changed."""
    key, *rest = path
    below = tree.get(key)
    inner = put(below if isinstance(below, dict) else {}, tuple(rest), value) if rest else value
    return tree | {key: inner}


def try_json(checkpoint: Checkpoint, name: str, cases: Iterator[tuple[tuple[str, ...], Any]]) -> list[str]:
    """Plan with each change of a file, for every target."""
    file = checkpoint.path / name
    text = file.read_text()
    found = []
    try:
        for path, value in cases:
            file.write_text(json.dumps(put(json.loads(text), path, value)))

            def plans() -> None:
                changed = Checkpoint(checkpoint.path)
                for target in TARGETS:
                    _ = plan_convert(changed, checkpoint.path / "o.gguf", target=target).files[0].header

            if wrong := problem(plans):
                found.append(f"{'.'.join(path)} = {shown(value)}: {wrong}")
    finally:
        file.write_text(text)
    return found


def keys_read(checkpoint: Checkpoint) -> list[tuple[str, ...]]:
    """Paths of the values of config.json that any target asks for, and those that the gguf package looks at."""
    noted: dict[tuple[str, ...], None] = {}
    for target in TARGETS:
        noting = Checkpoint(checkpoint.path)
        noting.config = Noting(noting.config, noted)
        plan_convert(noting, checkpoint.path / "o.gguf", target=target)
    for spelling in ("rope_parameters", "rope_scaling"):
        noted[(spelling,)] = noted[spelling, "attention_factor"] = noted[spelling, "main"] = None
    noted |= dict.fromkeys((f"{kind}_token_id",) for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
    noted["_name_or_path",] = None
    assert ("num_hidden_layers",) in noted
    assert ("rope_scaling", "factor") in noted
    return list(noted)


def test_values_of_config_json(checkpoint: Checkpoint) -> None:
    assert not try_json(checkpoint, "config.json", sampled(keys_read(checkpoint), JSON, every=False))


@pytest.mark.slow
def test_every_value_of_config_json(checkpoint: Checkpoint) -> None:
    assert not try_json(checkpoint, "config.json", sampled(keys_read(checkpoint), JSON, every=True))


SAMPLING = [
    "sequence", "top_k", "top_p", "min_p", "xtc_probability", "xtc_threshold", "temperature", "penalty_last_n",
    "penalty_repeat", "mirostat", "mirostat_tau", "mirostat_eta",
]  # fmt: skip


@pytest.mark.parametrize("checkpoint", ["gpt_oss"], indirect=True)
def test_values_of_generation_config_json(checkpoint: Checkpoint) -> None:
    assert not try_json(checkpoint, "generation_config.json", sampled([(k,) for k in SAMPLING], JSON, every=False))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["deepseek_v3"], indirect=True)
def test_every_value_of_generation_config_json(checkpoint: Checkpoint) -> None:
    assert not try_json(checkpoint, "generation_config.json", sampled([(k,) for k in SAMPLING], JSON, every=True))


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("temperature", "x", "temperature is 'x', expected a number that float32 can hold"),
        ("temperature", [1], "temperature is [1], expected a number"),
        ("temperature", {}, "temperature is {}, expected a number"),
        ("temperature", math.nan, "temperature is nan"),
        ("top_p", math.inf, "top_p is inf"),
        ("min_p", 1e308, "min_p is 1e+308"),
        ("top_k", 1.5, "top_k is 1.5, expected an integer from -2147483648 to 2147483647"),
        ("top_k", True, "top_k is True, expected an integer"),
        ("sequence", 1, "sequence is 1, expected a text"),
    ],
)
def test_a_sampling_parameter_of_another_type(
    key: str, value: Any, needed: str, checkpoint_path: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    path = tmp_path / "Tiny"
    shutil.copytree(checkpoint_path("mini"), path)
    (path / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(GGUFError) as caught:
        plan_convert(path, tmp_path / "o.gguf")
    assert needed in str(caught.value)
    assert str(path / "generation_config.json") in str(caught.value)


# Keys of a GGUF -------------------------------------------------------------------------------------------------

MORE_KEYS = [
    "general.sampling.top_k", "general.sampling.sequence", "general.sampling.mirostat", "general.author",
    "general.version", "general.basename", "general.finetune", "general.organization", "general.description",
    "general.license.name", "general.license.link", "general.tags", "general.languages",
    "deepseek4.nextn_predict_layers", "deepseek4.vocab_size", "deepseek4.expert_group_count",
    "deepseek4.leading_dense_block_count", "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.cls_token_id", "tokenizer.ggml.mask_token_id", "tokenizer.ggml.add_sep_token", "ggufx.dialect",
]  # fmt: skip


@pytest.fixture(scope="module", params=["nisparks", "llama.cpp"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[File]:
    root = tmp_path_factory.mktemp("keys")
    make("deepseek_v4", root / "Tiny")
    convert(root / "Tiny", root / "m.gguf", target=request.param, dense=None if request.param == "nisparks" else "bf16")
    with ggufx.open(root / "m.gguf") as file, execute.open_files():
        yield file


def try_keys(file: File, cases: Iterator[tuple[str, Value | None]], every: bool) -> list[str]:
    """Plan all that reads metadata with each change of it, or by turns one thing."""
    own = file.metadata._values
    out = file.path.parent
    tasks: dict[str, Callable[[], Any]] = {
        f"retarget {target}": lambda target=target: plan_retarget(file, out / "o.gguf", target)  # type: ignore[misc]
        for target in ("nisparks", "llama.cpp", "ds4")
    }
    tasks["export"] = lambda: plan_export(file, out / "back")
    tasks["quantize"] = lambda: plan_quantize(file, out / "o.gguf", default="Q4_K_M", target="llama.cpp")
    found = []
    try:
        for number, (key, value) in enumerate(cases):
            file.metadata._values = {k: v for k, v in own.items() if k != key} | ({} if value is None else {key: value})
            for name, task in list(tasks.items()) if every else [list(tasks.items())[number % len(tasks)]]:
                if wrong := problem(lambda task=task: getattr(task().files[0], "header", None)):  # type: ignore[misc]
                    found.append(f"{name}: {key} = {shown(value)}: {wrong}")
            if wrong := problem(lambda: file.file_type):
                found.append(f"file_type: {key} = {shown(value)}: {wrong}")
    finally:
        file.metadata._values = own
    return found


def test_values_of_keys(opened: File) -> None:
    assert not try_keys(opened, sampled([*opened.metadata, *MORE_KEYS], METADATA, every=False), every=False)


@pytest.mark.slow
def test_every_value_of_every_key(opened: File) -> None:
    assert not try_keys(opened, sampled([*opened.metadata, *MORE_KEYS], METADATA, every=True), every=True)


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        (
            "general.architecture",
            Value.array(ValueType.UINT32, [1, 2]),
            "general.architecture is an array of 2, expected",
        ),
        ("general.file_type", Value(ValueType.INT32, -1), "general.file_type is -1, expected an integer from 0"),
        (
            "tokenizer.chat_template",
            Value.array(ValueType.STRING, ["a"]),
            "tokenizer.chat_template is ['a'], expected a text",
        ),
        ("deepseek4.block_count", Value(ValueType.FLOAT32, 3.0), "deepseek4.block_count is 3.0, expected an integer"),
        ("deepseek4.expert_weights_norm", Value.u32(1), "deepseek4.expert_weights_norm is 1, expected true or false"),
        ("deepseek4.attention.compress_ratios", Value.array(ValueType.STRING, ["0"]), "expected an array of integers"),
    ],
)
def test_a_key_of_another_type(key: str, value: Value, needed: str, opened: File) -> None:
    own = opened.metadata._values
    opened.metadata._values = own | {key: value}
    try:
        with pytest.raises(GGUFError) as caught:
            plan_retarget(opened, opened.path.parent / "o.gguf", "ds4")
    finally:
        opened.metadata._values = own
    assert needed in str(caught.value)
    assert str(opened.path) in str(caught.value)
    assert ("download" if key == "general.architecture" else "ggufx set") in str(caught.value)

"""``ggufx merge``: a tiny FP8 V3 and its own GGUF become KTransformers' folder, or one GGUF, and every byte is a source's.

The folder is read by the safetensors library and by the tests' own parser, the GGUF by the gguf package; the names are
written down here once more.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import ggufx
from ggufx import quantize
from ggufx.checkpoint import Checkpoint
from ggufx.convert import convert
from ggufx.diff import diff
from ggufx.errors import GGUFError
from ggufx.file import Tensor
from ggufx.measure import measure
from ggufx.merge import merge, plan_merge
from ggufx.recipe import Recipe
from ggufx.verify import verify

from .conftest import Run, assert_one_line
from .oracle import Source

Cli = Callable[..., Run]

SMALL = {"hidden": 256, "ffn": 384, "moe": 256, "experts": 8, "heads": 2, "merges": 40}
CASES = {
    "float": SMALL | {"chat_template": "{{ bos_token }}"},
    "ue8m0": SMALL | {"scales": "ue8m0", "mtp_layers": 2, "shards": 1},
}  # fmt: skip
RECIPES = {
    "classic": "ffn_gate_exps=q4_0\nffn_up_exps=bf16\nblk.1.ffn_down_exps=q8_0\nffn_down_exps=f32\n.*=q8_0",
    # Scales at the head of each row, and ids that ik_llama.cpp alone has.
    "ik": "ffn_gate_exps=iq4_ks\nffn_up_exps=iq4_k\nffn_down_exps=iq4_ks\n.*=q8_0",
}
TARGETS = {"classic": "llama.cpp", "ik": "ik_llama.cpp"}
IDS = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "BF16": 30, "IQ4_K": 139, "IQ4_KS": 144}
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}  # fmt: skip
GLOBAL = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
          "lm_head.weight": "output.weight"}  # fmt: skip


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of the checkpoint of a case; not to be changed."""
    from make_tiny_v3 import make_tiny_v3

    root = tmp_path_factory.mktemp("v3")

    def get(case: str) -> Path:
        path = root / f"Tiny-V3-{case}"
        if not path.exists():
            make_tiny_v3(path, **CASES[case])
        return path

    return get


@pytest.fixture(scope="module")
def gguf_of(source_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The checkpoint's own GGUF by one of the recipes, alone in its directory; not to be changed."""
    root = tmp_path_factory.mktemp("gguf")

    def get(case: str, kind: str) -> Path:
        path = root / f"{case}-{kind}" / "model.gguf"
        if not path.exists():
            rules = Recipe.parse(RECIPES[kind])
            quantize.quantize(source_of(case), path, recipe=rules, target=TARGETS[kind], effort="fast")
        return path

    return get


@pytest.fixture(scope="module")
def hybrid(
    source_of: Callable[[str], Path], gguf_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder made of the case "float" and the classic types; not to be changed."""
    path = tmp_path_factory.mktemp("hybrid") / "out"
    merge(source_of("float"), gguf_of("float", "classic"), path)
    return path


def renamed(name: str, n_layers: int) -> str | None:
    """KTransformers' name of a checkpoint tensor; ``None`` for routed experts and for what is past the last layer."""
    weight, scale = re.fullmatch(r"(.*?)(_scale_inv)?", name).groups()  # type: ignore[union-attr]
    if weight in GLOBAL:
        return GLOBAL[weight]
    layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", weight).groups()  # type: ignore[union-attr]
    if int(layer) >= n_layers or ".experts." in rest:
        return None
    if rest == "mlp.gate.e_score_correction_bias":
        return f"blk.{layer}.exp_probs_b.bias"
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight{scale or ''}"


def decoded(source: Source, name: str) -> np.ndarray:
    """Values of an FP8 tensor of the checkpoint: float32."""
    tensor, scale = source.tensors[name], source.tensors[name + "_scale_inv"]
    full = np.repeat(np.repeat(scale.data.view("<f4").reshape(scale.shape), 128, 0), 128, 1)
    codes = tensor.data.view(ml_dtypes.float8_e4m3fn).reshape(tensor.shape).astype(np.float32)
    return codes * full[: tensor.shape[0], : tensor.shape[1]]


# The folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "kind"), [("float", "classic"), ("ue8m0", "ik")])
def test_every_expert_block_and_fp8_code_equals_its_source(
    case: str, kind: str, source_of: Callable[[str], Path], gguf_of: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    model, out = gguf_of(case, kind), tmp_path / "out"
    run = cli("merge", "--safetensor_path", source_of(case), "--gguf_path", model.parent, "--output_path", out)
    assert run.code == 0, run.err
    assert ("KTransformers' loader does not know the experts' type IQ4_K, IQ4_KS" in run.err) == (kind == "ik")
    source, made, gguf = Source(source_of(case)), Source(out), ggufx.open(model)
    experts = {name: tensor for name, tensor in gguf.items() if "_exps" in name}
    assert len(experts) == 6
    # The bytes, by the tests' own parser.
    wanted = {new: tensor for old, tensor in source.tensors.items() if (new := renamed(old, 3)) is not None}
    plain = {name: tensor for name, tensor in made.tensors.items() if "_exps" not in name}
    assert plain.keys() == wanted.keys()
    for name, tensor in plain.items():
        assert (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape)
        assert np.array_equal(tensor.data, wanted[name].data), name
    packed = {name: tensor for name, tensor in made.tensors.items() if "_exps" in name}
    assert packed.keys() == {n for name in experts for n in (name, name.removesuffix("weight") + "ggml_type")}
    for name, expert in experts.items():
        bytes_ = gguf_bytes(model, expert)
        assert (packed[name].dtype, packed[name].shape) == ("U8", (expert.nbytes,))
        assert np.array_equal(packed[name].data, bytes_)
        number = packed[name.removesuffix("weight") + "ggml_type"]
        assert (number.dtype, number.shape) == ("I64", ())
        assert number.data.view("<i8")[0] == IDS[expert.type]
    # And by our own reader.
    with ggufx.open(out) as opened:
        assert opened.dialect == TARGETS[kind]
        assert set(opened) == {*experts, *(name for name in wanted if not name.endswith("_scale_inv"))}
        for name, expert in experts.items():
            found = opened[name]
            assert (found.type, found.type_id, found.shape) == (expert.type, expert.type_id, expert.shape)
            assert np.array_equal(found.packed, expert.packed)
            assert np.array_equal(found[3], expert[3])
        for old, tensor in source.tensors.items():
            name = renamed(old, 3)
            if tensor.dtype != "F8_E4M3" or name is None:
                continue
            found = opened[name]
            values = decoded(source, old)
            assert (found.type, found.shape, found.dtype) == ("F8_E4M3", tensor.shape, np.float32)
            assert np.array_equal(found.packed.reshape(-1), tensor.data)
            assert found.scales.tobytes() == source.tensors[old + "_scale_inv"].data.tobytes()  # type: ignore[attr-defined]
            assert np.array_equal(found.numpy().view(np.uint32), values.view(np.uint32))
            assert np.array_equal(found[100:260:3, 5:200], values[100:260:3, 5:200])
            assert np.array_equal(found[-1], values[-1])
            assert np.array_equal(found[[3, 130, 3]], values[[3, 130, 3]])
            assert np.array_equal(found[..., 7], values[..., 7])
            assert np.array_equal(found[[[1, 2], [200, 4]]], values[[[1, 2], [200, 4]]])
            assert found[5:5].shape == values[5:5].shape
            for wrong in (None, True, (1, None), values.shape[0]):
                with pytest.raises(IndexError):
                    found[wrong]


def gguf_bytes(path: Path, tensor: Tensor) -> np.ndarray:
    """Bytes of a tensor of a GGUF by its place."""
    with path.open("rb") as file:
        file.seek(tensor.file_offset)
        return np.frombuffer(file.read(tensor.nbytes), np.uint8)


def test_the_folder_as_others_read_it(
    hybrid: Path, source_of: Callable[[str], Path], gguf_of: Callable[..., Path]
) -> None:
    """Files as KTransformers' loader counts them, tensors by the safetensors library, blocks by the gguf package."""
    import gguf
    from safetensors import safe_open

    files = [f"model-{number:05d}-of-00003.safetensors" for number in range(4)]
    assert sorted(path.name for path in hybrid.glob("*.safetensors")) == files
    weight_map = json.loads((hybrid / "model.safetensors.index.json").read_text())["weight_map"]
    reader = gguf.GGUFReader(gguf_of("float", "classic"))
    blocks = {tensor.name: tensor for tensor in reader.tensors if "_exps" in tensor.name}
    total = 0
    for number, name in enumerate(files):
        with safe_open(hybrid / name, framework="numpy") as shard:
            keys = set(shard.keys())
            assert keys == {key for key, file in weight_map.items() if file == name}
            prefix = f"blk.{number - 1}." if number else ("token_embd", "output")
            assert all(key.startswith(prefix) for key in keys)
            for key in keys:
                if key.endswith("_exps.ggml_type"):
                    kind = shard.get_tensor(key)
                    assert (kind.shape, kind.dtype) == ((), np.int64)
                    block = blocks.pop(key.removesuffix("ggml_type") + "weight")
                    assert int(kind) == block.tensor_type
                    assert np.array_equal(shard.get_tensor(block.name), block.data.view(np.uint8).reshape(-1))
        total += sum(tensor.data.size for tensor in Source(hybrid).shards[name].values())
    assert not blocks
    assert json.loads((hybrid / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == total
    source = source_of("float")
    small = {path.name for path in source.iterdir() if path.suffix not in (".safetensors",)}
    assert {path.name for path in hybrid.iterdir()} == {*files, *small}
    for name in small - {"model.safetensors.index.json"}:
        assert (hybrid / name).read_bytes() == (source / name).read_bytes()
    # What is aligned to more bytes lies first, so that numbers can be read where they lie.
    for path in hybrid.glob("*.safetensors"):
        raw = path.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        for entry in json.loads(raw[8 : 8 + length]).values():
            width = {"I64": 8, "F32": 4, "BF16": 2}.get(entry["dtype"], 1)
            assert (8 + length + entry["data_offsets"][0]) % width == 0


def test_a_split_file_a_member_and_a_directory_give_the_same(
    hybrid: Path, source_of: Callable[[str], Path], gguf_of: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    run = cli("split", gguf_of("float", "classic"), "--outfile", tmp_path / "s" / "m", "--split-max-size", "1M")
    assert run.code == 0
    members = sorted((tmp_path / "s").iterdir())
    assert len(members) > 2
    for number, place in enumerate((tmp_path / "s", members[1])):
        merge(source_of("float"), place, tmp_path / f"out{number}")
        for path in hybrid.iterdir():
            assert (tmp_path / f"out{number}" / path.name).read_bytes() == path.read_bytes(), path.name


def test_dry_run_and_going_on(
    hybrid: Path, source_of: Callable[[str], Path], gguf_of: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    arguments = ["merge", "--safetensor-path", source_of("float"), "--gguf-path", gguf_of("float", "classic"),
                 "--output-path", tmp_path / "out"]  # fmt: skip
    run = cli(*arguments, "--dry-run", "--json")
    assert run.code == 0
    plan = json.loads(run.out)
    assert not (tmp_path / "out").exists()
    down = next(t for t in plan["tensors"] if t["name"] == "blk.2.ffn_down_exps.weight")
    assert (down["type"], down["shape"], down["lossless"]) == ("F32", [8, 256, 256], True)
    reasons = {row["reason"] for row in plan["skipped"]}
    assert any("num_nextn_predict_layers" in reason for reason in reasons)
    assert "the routed experts are the GGUF's" in reasons
    left_out = {row["name"] for row in plan["skipped"]}
    assert left_out | {name for t in plan["tensors"] for name in t["sources"]} >= set(Checkpoint(source_of("float")))

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(source_of("float"), gguf_of("float", "classic"), tmp_path / "out", threads=1, progress=stop)
    assert list((tmp_path / "out").glob("*.partial"))
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert cli(*arguments).code == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in hybrid.iterdir()
    }
    assert_one_line(cli(*arguments), "exists", "--overwrite")


# One GGUF -------------------------------------------------------------------------------------------------------


def test_one_gguf_keeps_fp8_where_scales_are_powers_of_two(
    source_of: Callable[[str], Path], gguf_of: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    model, out = gguf_of("ue8m0", "classic"), tmp_path / "out"
    run = cli("merge", "--safetensor-path", source_of("ue8m0"), "--gguf-path", model, "--output-path", out, "--format",
              "gguf")  # fmt: skip
    assert run.code == 0, run.err
    assert "attn_output.weight of 3 layers" in run.err
    (path,) = out.iterdir()
    (native,) = convert(source_of("ue8m0"), tmp_path / "native.gguf", target="nisparks")
    with ggufx.open(path) as made, ggufx.open(native) as whole, ggufx.open(model) as experts:
        assert list(made) == list(whole)
        assert made["blk.1.attn_q_b.weight"].type == "F8_E4M3_B128"
        assert made["blk.1.attn_output.weight"].type == "BF16"
        for name, tensor in made.items():
            origin = experts[name] if "_exps" in name else whole[name]
            assert (tensor.type, tensor.shape) == (origin.type, origin.shape)
            assert np.array_equal(tensor.packed, origin.packed), name
        ours, theirs = made.metadata.typed(), whole.metadata.typed()
        assert list(ours) == list(theirs)
        assert [key for key in ours if not ours[key].same(theirs[key])] == ["general.file_type"]
        assert path.name == "Tiny-V3-Ue8M0-8x4.1M-Q4_0.gguf"


def test_one_gguf_in_the_dialect_that_holds_the_experts(
    source_of: Callable[[str], Path], gguf_of: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    arguments = ["merge", "--safetensor-path", source_of("ue8m0"), "--gguf-path", gguf_of("ue8m0", "ik"),
                 "--output-path", tmp_path / "out.gguf", "--format", "gguf"]  # fmt: skip
    assert_one_line(cli(*arguments, "--target", "nisparks"), "nisparks cannot hold", "IQ4_KS")
    assert cli(*arguments, "--dense", "q8_0").code == 0
    with ggufx.open(tmp_path / "out.gguf") as made, ggufx.open(gguf_of("ue8m0", "ik")) as experts:
        assert made.dialect == "ik_llama.cpp"
        assert made["blk.0.attn_kv_b.weight"].type == "Q8_0"
        for name in (name for name in made if "_exps" in name):
            assert np.array_equal(made[name].packed, experts[name].packed)


# What is refused, before a byte is written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ("fewer-experts", ("ffn_down_exps.weight", "7 experts, config.json says 8", "different models")),
        ("narrower", ("blk.1.ffn_gate_exps.weight", "shape [8, 128, 256], config.json says [8, 256, 256]")),
        ("no-layer", ("blk.2.ffn_down_exps.weight", "missing (3 of 6")),
        ("other-model", ("'qwen3moe'", "'deepseek2'")),
        ("unknown-type", ("blk.1.ffn_up_exps.weight", "type id 999")),
    ],
)
def test_experts_that_do_not_fit(
    change: str, needed: tuple[str, ...], source_of: Callable[[str], Path], cli: Cli, tmp_path: Path
) -> None:
    def tensors(layer: int) -> dict[str, tuple[tuple[int, ...], int]]:
        count = 7 if change == "fewer-experts" else 8
        inter = 128 if change == "narrower" else 256
        shapes = {"down": (count, 256, 256), "gate": (count, inter, 256), "up": (count, 256, 256)}
        odd = change == "unknown-type"
        return {
            f"blk.{layer}.ffn_{name}_exps.weight": (shape, 999 if odd and name == "up" else 0)
            for name, shape in shapes.items()
        }

    held = tensors(1) | ({} if change == "no-layer" else tensors(2))
    path = tmp_path / "in" / "model.gguf"
    path.parent.mkdir()
    write_gguf(path, "qwen3moe" if change == "other-model" else "deepseek2", held)
    run = cli("merge", "--safetensor-path", source_of("float"), "--gguf-path", path.parent, "--output-path",
              tmp_path / "out")  # fmt: skip
    assert_one_line(run, *needed)
    assert not (tmp_path / "out").exists()


def write_gguf(path: Path, architecture: str, tensors: dict[str, tuple[tuple[int, ...], int]]) -> None:
    """Write a sparse GGUF of F32 bytes, or of bytes under another number."""
    from ggufx.container import Value, encode_header

    offset, directory = 0, []
    for name, (shape, kind) in tensors.items():
        directory.append((name, shape, kind, offset))
        offset += prod(shape) * 4
    header = encode_header({"general.architecture": Value.string(architecture)}, directory, 32)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + offset)


def test_places_that_do_not_fit(
    source_of: Callable[[str], Path], gguf_of: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    source, model, out = source_of("float"), gguf_of("float", "classic"), tmp_path / "out"

    def run(gguf: Path = model, to: Path = out, *more: object) -> Run:
        return cli("merge", "--safetensor-path", source, "--gguf-path", gguf, "--output-path", to, *more)

    empty = tmp_path / "empty"
    (empty / "Q4_K_M").mkdir(parents=True)
    assert_one_line(run(empty), "holds no *.gguf file")
    shutil.copy(model, empty / "Q4_K_M" / "a.gguf")
    assert_one_line(run(empty), "holds no *.gguf file", "Q4_K_M")
    shutil.copy(model, empty / "Q4_K_M" / "b.gguf")
    assert_one_line(run(empty / "Q4_K_M"), "ffn_", "is in a.gguf and in b.gguf")
    assert_one_line(run(model, source), "holds the sources")
    assert_one_line(run(model, model.parent), "holds the sources")
    assert_one_line(run(model, model), "is a file")
    assert_one_line(run(model, out, "--dense", "bf16"), "--format gguf")
    assert_one_line(run(model, out, "--model-name", "Mine"), "--format gguf")
    assert not out.exists()
    out.mkdir()
    (out / "model-00001-of-00009.safetensors").touch()
    assert_one_line(run(), "model-00001-of-00009.safetensors", "not of this merge")
    assert_one_line(run(tmp_path / "none.gguf"), "none.gguf")


def test_other_architectures_are_for_one_gguf_only(
    checkpoint_path: Callable[[str], Path], cli: Cli, tmp_path: Path
) -> None:
    """DeepSeek-V4 with experts of its own GGUF: KTransformers has no layout for it, a GGUF can hold it."""
    source = checkpoint_path("flash")
    (model,) = convert(source, tmp_path / "model.gguf", target="llama.cpp")
    arguments = ["merge", "--safetensor-path", source, "--gguf-path", model, "--output-path"]
    assert_one_line(cli(*arguments, tmp_path / "out"), "deepseek4", "--format gguf")
    assert cli(*arguments, tmp_path / "one.gguf", "--format", "gguf").code == 0
    (native,) = convert(source, tmp_path / "native.gguf", target="nisparks")
    with ggufx.open(tmp_path / "one.gguf") as made, ggufx.open(native) as whole:
        assert {n: (t.type, t.packed.tobytes()) for n, t in made.items()} == {
            n: (t.type, t.packed.tobytes()) for n, t in whole.items()
        }


# The way back -----------------------------------------------------------------------------------------------------


def test_inspect_shows_a_hybrid(hybrid: Path, cli: Cli) -> None:
    run = cli("inspect", hybrid, "--tensors", "blk.1.*")
    assert run.code == 0
    assert "format: hybrid" in run.out
    assert "version" not in run.out
    for text in ("blk.1.ffn_gate_exps.weight", "[8, 256, 256]", "Q4_0", "F8_E4M3", "routed experts"):
        assert text in run.out
    assert "_scale_inv" not in run.out
    assert "ggml_type" not in run.out
    found = json.loads(cli("inspect", hybrid, "--json").out)
    assert found["file"]["format"] == "hybrid"
    assert found["file"]["n_tensors"] == len(ggufx.open(hybrid))
    assert found["by_type"]["Q4_0"]["bits_per_weight"] == 4.5
    assert found["by_type"]["F8_E4M3"]["bits_per_weight"] == pytest.approx(8 + 32 / 128**2, rel=1e-3)
    assert found["file"]["nbytes"] == sum(path.stat().st_size for path in hybrid.glob("*.safetensors"))


def test_a_folder_of_the_original_script(hybrid: Path, tmp_path: Path) -> None:
    """No config, no index, and F32 experts without a type: shapes follow from the router's."""
    shutil.copytree(hybrid, tmp_path / "out")
    copy = Source(tmp_path / "out")
    copy.drop("blk.2.ffn_down_exps.ggml_type")
    copy.save()
    for path in (tmp_path / "out").glob("*.json"):
        path.unlink()
    with ggufx.open(tmp_path / "out") as found, ggufx.open(hybrid) as wanted:
        assert {n: (t.type, t.shape) for n, t in found.items()} == {n: (t.type, t.shape) for n, t in wanted.items()}
        down = "blk.2.ffn_down_exps.weight"
        assert np.array_equal(found[down].numpy(), wanted[down].numpy())
        out = np.empty(found["blk.0.attn_q_b.weight"].shape, np.float16)
        assert found["blk.0.attn_q_b.weight"].numpy(out=out) is out
        assert np.array_equal(out, wanted["blk.0.attn_q_b.weight"].numpy(np.float16))
        with pytest.raises(GGUFError, match="must be a writeable"):
            found["blk.0.attn_q_b.weight"].numpy(out=out[:-1])


def test_scales_as_powers_of_two_in_one_byte(hybrid: Path, tmp_path: Path) -> None:
    shutil.copytree(hybrid, tmp_path / "out")
    copy, name = Source(tmp_path / "out"), "blk.0.attn_q_b.weight"
    exponents = np.arange(110, 125, dtype=np.uint8).reshape(3, 5)
    copy.put(f"{name}_scale_inv", "F8_E8M0", (3, 5), exponents)
    copy.save()
    tensor = copy.tensors[name]
    codes = tensor.data.view(ml_dtypes.float8_e4m3fn).reshape(tensor.shape).astype(np.float32)
    full = np.repeat(np.repeat(np.exp2(exponents.astype(np.float32) - 127), 128, 0), 128, 1)
    found = ggufx.open(tmp_path / "out")[name]
    assert np.array_equal(found.numpy(), codes * full)
    assert np.array_equal(found[200], (codes * full)[200])
    assert found.nbytes == codes.size + 15


def test_numbers_that_nobody_knows_and_opaque(hybrid: Path, tmp_path: Path) -> None:
    shutil.copytree(hybrid, tmp_path / "out")
    copy, name = Source(tmp_path / "out"), "blk.1.ffn_up_exps"
    copy.bytes_of(f"{name}.ggml_type").view("<i8")[0] = 999
    copy.save()
    with ggufx.open(tmp_path / "out") as found:
        tensor = found[f"{name}.weight"]
        assert (tensor.type, tensor.shape) == ("id 999", (tensor.nbytes,))
        assert np.array_equal(tensor.packed, ggufx.open(hybrid)[f"{name}.weight"].packed.reshape(-1))
        with pytest.raises(GGUFError, match="type id 999"):
            tensor.numpy()
    with ggufx.open(hybrid, dialect="opaque") as found:
        assert found[f"{name}.weight"].type == "id 30"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("scales", "blk.1.attn_q_b.weight.*_scale_inv' is missing"),
        ("scale-shape", r"_scale_inv' are F32\[1, 1\], expected F32\[3, 5\]"),
        ("bytes", "blk.1.ffn_gate_exps.weight.*no whole rows of Q4_0"),
        ("down", "blk.2.ffn_down_exps.weight.*no whole rows of F32"),
        ("type", r"ffn_gate_exps.ggml_type' is F32\[1\], expected one I64"),
        ("twice", "'token_embd.weight' is in model-00000"),
        ("config", "config.json: cannot be read as JSON"),
    ],
)
def test_damaged_folders(change: str, message: str, hybrid: Path, tmp_path: Path) -> None:
    shutil.copytree(hybrid, tmp_path / "out")
    copy = Source(tmp_path / "out")
    scale, gate = "blk.1.attn_q_b.weight_scale_inv", "blk.1.ffn_gate_exps"
    if change == "scales":
        copy.drop(scale)
    elif change == "scale-shape":
        copy.put(scale, "F32", (1, 1), np.ones(1, np.float32))
    elif change == "bytes":
        data = copy.tensors[f"{gate}.weight"].data[:-1]
        copy.put(f"{gate}.weight", "U8", data.shape, data)
    elif change == "down":
        data = copy.tensors["blk.2.ffn_down_exps.weight"].data[:-4096]
        copy.put("blk.2.ffn_down_exps.weight", "U8", data.shape, data)
    elif change == "type":
        copy.put(f"{gate}.ggml_type", "F32", (1,), np.ones(1, np.float32))
    elif change == "twice":
        tensor = copy.tensors["token_embd.weight"]
        copy.put("token_embd.weight", tensor.dtype, tensor.shape, tensor.data, shard=list(copy.shards)[1])
    copy.save()
    if change == "config":
        (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(GGUFError, match=message):
        ggufx.open(tmp_path / "out")


def changed(hybrid: Path, to: Path, change: Callable[[Source], object]) -> Path:
    """A copy of a folder with something else in it."""
    shutil.copytree(hybrid, to)
    copy = Source(to)
    change(copy)
    copy.save()
    return to


def flip(copy: Source, name: str) -> None:
    copy.bytes_of(name)[5] ^= 1


def test_verify_proves_a_folder(
    hybrid: Path, source_of: Callable[[str], Path], gguf_of: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    """Every tensor equals one of the two sources; a changed bit anywhere is found and named."""
    source, model = source_of("float"), gguf_of("float", "classic")
    run = cli("verify", hybrid, "--against", source, "--experts", model)
    assert run.code == 0, run.out
    n_tensors = len(ggufx.open(hybrid))
    assert f"verified (hybrid): {n_tensors} exact" in run.out
    report = verify(hybrid, source, experts=model.parent)
    assert {tensor.status for tensor in report.tensors} == {"exact"}
    assert {tensor.name for tensor in report.tensors} == set(ggufx.open(hybrid))
    # Without the GGUF its experts are what they are: roundings of the checkpoint's.
    report = verify(hybrid, source)
    assert report.ok
    assert {tensor.name for tensor in report.tensors if tensor.status == "rounded"} == {
        name for name, tensor in ggufx.open(hybrid).items() if "_exps" in name and tensor.type != "F32"
    }
    for number, stored in enumerate(
        ("blk.1.attn_q_b.weight", "blk.1.attn_q_b.weight_scale_inv", "blk.2.ffn_up_exps.weight", "output_norm.weight",
         "blk.2.ffn_down_exps.weight", "blk.1.exp_probs_b.bias")
    ):  # fmt: skip
        bad = changed(hybrid, tmp_path / str(number), lambda s, n=stored: flip(s, n))
        report = verify(bad, source, experts=model)
        assert not report.ok
        assert [t.name for t in report.tensors if t.status != "exact"] == [stored.removesuffix("_scale_inv")]
        assert cli("verify", bad, "--against", source, "--experts", model).code == 1
    bad = changed(hybrid, tmp_path / "less", lambda s: s.drop("blk.0.attn_norm.weight"))
    assert {t.name: t.status for t in verify(bad, source).tensors if t.status not in ("exact", "rounded")} == {
        "blk.0.attn_norm.weight": "missing"
    }
    bad = changed(
        hybrid, tmp_path / "more", lambda s: s.put("odd", "F32", (1,), np.ones(1, "<f4"), shard=next(iter(s.shards)))
    )
    assert {t.name: t.status for t in verify(bad, source).tensors if t.status not in ("exact", "rounded")} == {
        "odd": "extra"
    }
    # Experts of something else are far, whoever quantized them.
    name = "blk.1.ffn_gate_exps.weight"
    bad = changed(
        hybrid, tmp_path / "far", lambda s: s.put(name, "U8", s.tensors[name].shape, s.tensors[name].data[::-1].copy())
    )
    assert [t.name for t in verify(bad, source).tensors if t.status == "different"] == [name]


def test_verify_takes_no_experts_of_another_type(
    hybrid: Path, source_of: Callable[[str], Path], cli: Cli, tmp_path: Path
) -> None:
    """The unquantized model is near, but not what was merged."""
    (other,) = convert(source_of("float"), tmp_path / "bf16.gguf", target="llama.cpp")
    run = cli("verify", hybrid, "--against", source_of("float"), "--experts", other)
    assert run.code == 1
    report = verify(hybrid, source_of("float"), experts=other)
    experts = {name: tensor.type for name, tensor in ggufx.open(hybrid).items() if "_exps" in name}
    quantized = {name for name, kind in experts.items() if kind not in ("F32", "F16", "BF16")}
    assert quantized
    assert quantized <= {tensor.name for tensor in report.tensors if tensor.status == "different"}


def test_verify_refuses_what_is_no_source(
    hybrid: Path, source_of: Callable[[str], Path], gguf_of: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    source, model = source_of("float"), gguf_of("float", "classic")
    assert_one_line(cli("verify", hybrid, "--against", model), "--experts", code=2)
    assert_one_line(cli("verify", model, "--against", model, "--experts", model), "--experts", code=2)
    write_gguf(tmp_path / "half.gguf", "deepseek2", {"blk.1.ffn_up_exps.weight": ((8, 256, 256), 0)})
    write_gguf(tmp_path / "none.gguf", "deepseek2", {"output_norm.weight": ((256,), 0)})
    for name, text in (("half", "blk.1.ffn_"), ("none", "no routed experts")):
        run = cli("verify", hybrid, "--against", source, "--experts", tmp_path / f"{name}.gguf")
        assert_one_line(run, text, code=2)


def test_verify_proves_a_merged_gguf(
    source_of: Callable[[str], Path], gguf_of: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    """Native tensors against the checkpoint, experts against the GGUF: only scales that are none cost something."""
    source, model, out = source_of("ue8m0"), gguf_of("ue8m0", "classic"), tmp_path / "out.gguf"
    merge(source, model, out, form="gguf")
    run = cli("verify", out, "--against", source, "--experts", model)
    assert run.code == 0, run.out
    status = {tensor.name: tensor.status for tensor in verify(out, source, experts=model).tensors}
    assert {name.split(".")[-2] for name, found in status.items() if found != "exact"} == {"attn_output"}
    run = cli("verify", out, "--against", source)
    assert run.code == 1
    assert "--experts names the GGUF" in run.out
    with ggufx.open(out) as made:
        at = made["blk.2.ffn_gate_exps.weight"].file_offset + 77
    raw = bytearray(out.read_bytes())
    raw[at] ^= 4
    out.write_bytes(raw)
    report = verify(out, source, experts=model)
    assert [t.name for t in report.tensors if t.status == "different"] == ["blk.2.ffn_gate_exps.weight"]


def test_diff_of_folders(
    hybrid: Path, source_of: Callable[[str], Path], gguf_of: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    run = cli("diff", hybrid, hybrid)
    assert (run.code, run.out.strip()) == (0, "the same")
    name = "blk.1.attn_q_b.weight"

    def halve(copy: Source) -> None:
        scales = copy.bytes_of(f"{name}_scale_inv").view("<f4")
        scales[7] /= 2  # of rows 128 to 255 and columns 256 to 383

    bad = changed(hybrid, tmp_path / "out", halve)
    (found,) = diff(hybrid, bad).tensors
    values = decoded(Source(source_of("float")), "model.layers.1.self_attn.q_b_proj.weight")
    tile = values[128:256, 256:384]
    assert (found.name, found.types, found.differing) == (name, ("F8_E4M3", "F8_E4M3"), np.count_nonzero(tile))
    assert found.max_error == np.abs(tile).max() / 2
    # Against a GGUF: its keys are not a folder's; the experts have its very bytes, F32 the very values.
    found_in = diff(hybrid, gguf_of("float", "classic"))
    assert not found_in.keys
    assert found_in.only_first == [f"blk.{layer}.attn_kv_b.weight" for layer in range(3)]
    assert not any("_exps" in t.name for t in found_in.tensors)
    (exact,) = convert(source_of("float"), tmp_path / "f32.gguf", target="ik_llama.cpp", dense="f32")
    wide = {t.name: t for t in diff(exact, hybrid).tensors}
    assert wide[name].types == ("F32", "F8_E4M3")
    assert all(t.differing == 0 for t in wide.values() if t.types[1] == "F8_E4M3")


def test_measure_of_a_folder(hybrid: Path, source_of: Callable[[str], Path], cli: Cli) -> None:
    values = decoded(Source(source_of("float")), "model.layers.1.self_attn.q_b_proj.weight")
    (found,) = measure(hybrid, ["q8_0"], pattern="blk.1.attn_q_b.weight", max_rows=10)
    assert (found.source_type, found.shape) == ("F8_E4M3", values.shape)
    rows = values[np.linspace(0, values.shape[0] - 1, 10).astype(int)]
    assert found.quality == ggufx.quality(rows, "Q8_0")
    assert cli("measure", hybrid, "--types", "q8_0", "--tensors", "blk.1.*").code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "@"],
        ["quantize", "@", "q8_0", "--dry-run"],
        ["recipe", "lint", "deepseek-v3-iq2_xxs", "@"],
        ["merge", "--safetensor-path", "@", "--gguf-path", "@", "--output-path", "out"],
    ],
)
def test_a_hybrid_is_no_checkpoint(arguments: list[str], hybrid: Path, gguf_of: Callable[..., Path], cli: Cli) -> None:
    here = [str(hybrid) if a == "@" else a for a in arguments]
    if "merge" in arguments:
        here[4] = str(gguf_of("float", "classic"))
    assert_one_line(cli(*here), str(hybrid), "is a hybrid", "--format gguf")


def test_a_checkpoint_is_no_hybrid_and_a_hybrid_no_gguf(
    hybrid: Path, source_of: Callable[[str], Path], cli: Cli, tmp_path: Path
) -> None:
    checkpoint = source_of("float")
    assert_one_line(cli("verify", checkpoint, "--against", hybrid), "ggufx convert", code=2)
    assert_one_line(cli("inspect", tmp_path), "no model")
    for arguments in (
        ["rewrite", hybrid, "--outfile", tmp_path / "o.gguf"],
        ["split", hybrid],
        ["set", hybrid, "a.b=u8:1"],
    ):
        assert_one_line(cli(*arguments), f"{hybrid}: is a directory, not a GGUF file")


def test_the_full_model(tmp_path: Path) -> None:
    """V3 itself, sparse, with experts of the published file's types: 62 files, as KTransformers counts them."""
    from make_fullshape_v3 import make_fullshape_v3

    make_fullshape_v3(tmp_path / "V3")
    types = {"down": 145, "gate": 16, "up": 16}
    row = {"down": 2 + 2048 // 256 * 70, "gate": 7168 // 256 * 66, "up": 7168 // 256 * 66}
    shape = {"down": (256, 7168, 2048), "gate": (256, 2048, 7168), "up": (256, 2048, 7168)}
    from ggufx.container import Value, encode_header

    offset, directory = 0, []
    for layer in range(3, 61):
        for kind, number in types.items():
            directory.append((f"blk.{layer}.ffn_{kind}_exps.weight", shape[kind], number, offset))
            offset += prod(shape[kind][:-1]) * row[kind]
    header = encode_header({"general.architecture": Value.string("deepseek2")}, directory, 32)
    with (tmp_path / "experts.gguf").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + offset)
    plan = plan_merge(tmp_path / "V3", tmp_path / "experts.gguf", tmp_path / "out")
    shards = [file for file in plan.files if file.path.suffix == ".safetensors"]
    assert [shards[0].path.name, shards[-1].path.name] == [
        "model-00000-of-00061.safetensors",
        "model-00061-of-00061.safetensors",
    ]
    assert len(shards) == 62
    assert {tensor.name for tensor in shards[0].tensors} == set(GLOBAL.values())
    assert all(t.name.startswith("blk.60.") for t in shards[-1].tensors)
    assert sum(t.nbytes for t in plan.tensors if "_exps" in t.name) == 172204490752  # as the published recipe has it
    assert not any(".61." in tensor.name for tensor in plan.tensors)


def test_links_out_of_the_checkpoint_are_not_followed(
    source_of: Callable[[str], Path], gguf_of: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    # A hybrid is made to be shared: what a stranger's link leads to must not get into it.
    checkpoint, secret = tmp_path / "hub" / "models--a--b" / "snapshots" / "c", tmp_path / "id_rsa"
    shutil.copytree(source_of("float"), checkpoint)
    secret.write_text("a private key")
    (checkpoint / "notes.txt").symlink_to(secret)
    (checkpoint / "LICENSE").symlink_to("../../../../id_rsa")
    blobs = tmp_path / "hub" / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "0").write_text("the model's own")
    (checkpoint / "README.txt").symlink_to("../../blobs/0")
    run = cli(
        "merge",
        "--safetensor-path",
        checkpoint,
        "--gguf-path",
        gguf_of("float", "classic"),
        "--output-path",
        tmp_path / "out",
    )
    assert run.code == 0, run
    assert "notes.txt is a link to a file outside of the checkpoint" in run.err
    assert "LICENSE is a link to a file outside of the checkpoint" in run.err
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert not (tmp_path / "out" / "LICENSE").exists()
    assert (tmp_path / "out" / "README.txt").read_text() == "the model's own"

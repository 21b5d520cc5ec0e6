"""Files that were moved, split or exported, in the programs that they were moved for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from . import need

need("torch")
need("transformers")
need("llama_cpp")
tokenizers = need("tokenizers")

from . import llama, reference  # noqa: E402
from .commands import ggufx  # noqa: E402
from .test_llama_cpp import SPECIAL_TEXTS, TEXTS, prompt  # noqa: E402

pytestmark = pytest.mark.interop

ROPE = ("type", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")


@pytest.fixture(scope="module")
def native(checkpoint, tmp_path_factory) -> Path:
    """The file that keeps FP8 and FP4: llama.cpp does not load it."""
    out = tmp_path_factory.mktemp("native") / "n.gguf"
    ggufx("convert", checkpoint, "--outfile", out)
    return out


@pytest.fixture(scope="module")
def model(checkpoint):
    return reference.load_reference(checkpoint)


@pytest.mark.parametrize("issue", [50, 45])
def test_native_file_moved_to_llama_cpp_computes_the_model(native, model, tmp_path, issue):
    """Exactly, as a conversion of the checkpoint does: the weights, and every key that was derived."""
    source = native
    if issue == 45:
        source = tmp_path / "n45.gguf"
        source.write_bytes(native.read_bytes())
        removals = [word for key in ROPE for word in ("--remove", f"deepseek4.rope.scaling.{key}")]
        ggufx("set", source, *removals)
    with pytest.raises(ValueError, match="does not load"):
        llama.Model(source)
    moved = tmp_path / "o.gguf"
    ggufx("retarget", source, "--outfile", moved, "--target", "llama.cpp")
    with llama.opened(llama.in_float32(moved, tmp_path / "f32.gguf")) as runtime:
        for length in (1, 130, 700):
            tokens = prompt(length)
            expected = reference.reference_logits(model, tokens)
            assert np.abs(runtime.logits(tokens) - expected).max() < 1e-3
    with llama.opened(moved) as runtime:
        assert np.isfinite(runtime.logits(prompt(7))).all()


def test_smaller_dense_types_and_ds4_run(native, choice_free, tmp_path):
    """Rounded files stay near the model (limits as for converted ones); llama.cpp loads what ds4 is given, too."""
    source = tmp_path / "n.gguf"
    ggufx("convert", choice_free, "--outfile", source)
    model = reference.load_reference(choice_free)
    tokens = prompt(130)
    expected = reference.reference_logits(model, tokens)
    for arguments in (("llama.cpp", "--dense", "q8_0"), ("ds4",), ("ds4", "--plain", "f16")):
        moved = tmp_path / "o.gguf"
        ggufx("retarget", source, "--outfile", moved, "--overwrite", "--target", *arguments)
        with llama.opened(llama.in_float32(moved, tmp_path / "f32.gguf")) as runtime:
            assert (runtime.logits(tokens) - expected).std() / expected.std() < 0.025, arguments


def test_llama_cpp_loads_a_split(native, tmp_path):
    moved = tmp_path / "o.gguf"
    ggufx("retarget", native, "--outfile", moved, "--target", "llama.cpp")
    for number, arguments in enumerate(((), ("--no-tensor-first-split",))):
        prefix = tmp_path / f"s{number}"
        ggufx("split", moved, "--outfile", prefix, "--split-max-tensors", "40", *arguments)
        with llama.opened(min(tmp_path.glob(f"s{number}-*"))) as runtime, llama.opened(moved) as whole:
            assert np.array_equal(runtime.logits(prompt(7)), whole.logits(prompt(7)))


def test_transformers_loads_an_export(native, checkpoint, model, tmp_path):
    ggufx("export", native, "--outfile", tmp_path / "back")
    tokens = prompt(130)
    again = reference.load_reference(tmp_path / "back")
    assert np.array_equal(reference.reference_logits(again, tokens), reference.reference_logits(model, tokens))
    old, new = (
        tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")) for path in (checkpoint, tmp_path / "back")
    )
    for text in (*TEXTS, *SPECIAL_TEXTS):
        ids = old.encode(text).ids
        assert new.encode(text).ids == ids
        # A GGUF does not hold which of the tokens with a meaning are "special" to decoders that leave those out.
        assert new.decode(ids, skip_special_tokens=False) == old.decode(ids, skip_special_tokens=False)

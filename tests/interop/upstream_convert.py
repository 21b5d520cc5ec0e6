"""Run llama.cpp's own converter on a checkpoint whose tokenizer it does not know.

    python upstream_convert.py LLAMA_CPP_DIR q8_0|bf16 CHECKPOINT --outfile OUT [--mtp ...]

The converter knows tokenizers by a hash of what they make of a test text and refuses others. The tiny checkpoints'
tokenizers have the pre-tokenizer of their models but tokens of their own, so the name that the published files carry is
put in place of the look-up. The type is `--outtype`; DeepSeek-V4's converter chooses by itself: with `bf16` the dequantized
FP8 weights stay in BF16, which holds them exactly, where it would round them to Q8_0. Everything else is the converter as
it is.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

PRE_TOKENIZERS = {"deepseek_v3": "deepseek-v3", "deepseek_v4": "joyai-llm", "gpt_oss": "gpt-4o"}


def main() -> None:
    source = Path(sys.argv[1])
    sys.path[0:1] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel
    from conversion.deepseek import DeepseekV4Model
    from gguf import GGMLQuantizationType

    dense, checkpoint = sys.argv[2], Path(sys.argv[3])
    model_type = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model_type"]
    TextModel.get_vocab_base_pre = lambda self, tokenizer: PRE_TOKENIZERS[model_type]
    arguments = sys.argv[3:]
    if model_type != "deepseek_v4":
        arguments += ["--outtype", dense]
    elif dense == "bf16":
        own_choice = DeepseekV4Model.tensor_force_quant

        def without_q8_0(self: Any, *args: Any) -> Any:
            choice = own_choice(self, *args)
            return GGMLQuantizationType.BF16 if choice == GGMLQuantizationType.Q8_0 else choice

        DeepseekV4Model.tensor_force_quant = without_q8_0
    sys.argv = [str(source / "convert_hf_to_gguf.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

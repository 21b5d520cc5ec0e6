"""Options: none is ignored in silence, each is told in the words of who gave it, and all commands spell them alike."""

from __future__ import annotations

import inspect
import pickle
import re
import struct
import typing
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

import ggufx
from ggufx import budget, commands, convert, imatrix, merge, quantize, retarget, types
from ggufx.errors import GGUFError, OptionError, PlanError, UnknownType
from ggufx.options import USELESS, refuse

from .conftest import Run, assert_one_line, run_process

Cli = Callable[..., Run]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF with two quantized matrices and a head."""
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_chat_template("t" * 2000)
    random = np.random.default_rng(0)
    for name, kind in (("token_embd.weight", "Q8_0"), ("blk.0.ffn_down.weight", "Q4_0"), ("output.weight", "F16")):
        number = gguf.GGMLQuantizationType[kind]
        values = random.standard_normal((4, 256)).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# What has no effect -----------------------------------------------------------------------------------------------

SIZES = "--types, --per and --sample-len go with --target-size or --target-bpw"
LINES = {
    # (command, option): command line, and what is said; M is a GGUF, C a checkpoint's directory
    **{
        (name, "as_json"): (f"{name} {rest} --json", "--json goes with --dry-run")
        for name, rest in {
            "convert": "C", "retarget": "M -o o.gguf --target llama.cpp", "export": "M -o o", "split": "M",
            "merge": "--safetensor-path C --gguf-path M --output-path o", "merge-splits": "M",
            "quantize": "M o.gguf q8_0", "recipe fit": "M --target-bpw 5",
        }.items()
    },
    ("quantize", "skip"): ("quantize M o.gguf q8_0 --skip blk.0*", "--skip leaves tensors of a checkpoint out, and the sourc"),
    ("quantize", "model_name"): (
        "quantize M o.gguf q8_0 --model-name X",
        "--model-name is for a checkpoint, and the source is a GGUF, whose keys are kept; --override-kv sets others",
    ),
    ("quantize", "mtp"): ("quantize M o.gguf q8_0 --mtp", "--mtp is for a checkpoint, and the source is a GGUF"),
    ("quantize", "dialect"): (
        "quantize C o.gguf q8_0 --dialect llama.cpp", "--dialect says whose type ids a GGUF has, and the source is a checkpoi",
    ),
    ("quantize", "keep_split"): ("quantize C o.gguf q8_0 --keep-split", "--keep-split splits as a GGUF is split, and the sou"),
    ("quantize", "default"): ("quantize M o.gguf q8_0 --target-size 1G", "TYPE and a size exclude each other; --types names"),
    ("quantize", "mix"): ("quantize M -o o.gguf --mix --target-size 1G", "--mix and a size exclude each other; `ggufx recipe"),
    ("quantize", "pure"): ("quantize M -o o.gguf --pure --target-bpw 4", "--pure and a size exclude each other; `ggufx recip"),
    ("quantize", "type_names"): ("quantize M o.gguf q8_0 --types q4_k", SIZES),
    ("quantize", "per"): ("quantize M o.gguf q8_0 --per family", SIZES),
    ("quantize", "sample_len"): ("quantize M o.gguf q8_0 --sample-len 262144", SIZES),
    ("prepare", "mix"): ("quantize M o.gguf --custom-q a=q4_0 --mix", "--mix says that TYPE is a mix, and there is none"),
    ("prepare", "pure"): ("quantize M o.gguf --custom-q a=q4_0 --pure", "--pure gives TYPE to the embeddings and the head, t"),
    ("quantize", "output_type"): (
        "quantize M o.gguf q8_0 --output-tensor-type q6_k --leave-output-tensor",
        "--output-tensor-type and --leave-output-tensor exclude each other",
    ),
    ("quantize", "split_max_nbytes"): (
        "quantize M o.gguf q8_0 --split-max-size 1G --keep-split", "--split-max-size and --keep-split exclude each other",
    ),
    ("recipe show", "imatrix"): ("recipe show iq2_xxs --imatrix ones", "--imatrix goes with --for"),
    ("recipe show", "dialect"): ("recipe show iq2_xxs --dialect llama.cpp", "--dialect goes with --for"),
    ("verify", "experts"): ("verify M --against M --experts M", "--experts is for a file that is compared with a checkpoint,"),
    ("verify", "skip"): ("verify M --against M --skip a", "--skip is for a file that is compared with a checkpoint, and --ag"),
    ("verify", "allow_keys"): (
        "verify M --against M --allow-key a --ignore-metadata", "--allow-key and --ignore-metadata exclude each other",
    ),
    ("merge", "target"): (
        "merge --safetensor-path C --gguf-path M --output-path o --target nisparks", "--target goes with --format gguf; safet",
    ),
    ("merge", "dense"): (
        "merge --safetensor-path C --gguf-path M --output-path o --dense f32", "--dense goes with --format gguf; safetensors",
    ),
    ("merge", "model_name"): (
        "merge --safetensor-path C --gguf-path M -o o --model-name x", "--model-name goes with --format gguf; safetensors keep",
    ),
    ("merge", "split_max_nbytes"): (
        "merge --safetensor-path C --gguf-path M -o o --split-max-size 1G", "--split-max-size goes with --format gguf; safete",
    ),
    ("split", "split_max_tensors"): (
        "split M --split-max-tensors 1 --split-max-size 1G", "--split-max-size and --split-max-tensors: one of them at a time",
    ),
    ("types", "as_json"): ("types --json --markdown", "--json and --markdown: one of them at a time"),
    ("measure", "as_csv"): ("measure M --types q4_0 --csv --json", "--csv and --json: one of them at a time"),
    # What hangs on what is in the files.
    ("convert", "dense"): ("convert C --dense f32 --dry-run", "--dense f32 has no effect: nisparks keeps every tensor of"),
    ("convert", "skip"): ("convert C --skip zz* --dry-run", "--skip zz*: "),
    ("retarget", "dense"): ("retarget M -o o.gguf --target nisparks --dense f32", "--dense f32 has no effect: nisparks holds"),
    ("retarget", "plain"): ("retarget M -o o.gguf --target nisparks --plain f16", "--plain f16: is a choice that ds4's reade"),
}  # fmt: skip
PYTHON = {
    # What the command line does not offer, or cannot do.
    ("quantize", "chat_template"), ("quantize", "allow_nan"), ("merge", "chat_template"), ("verify", "ignore_metadata"),
    ("prepare", "output_type"),
    ("prepare", "keep_split"),
}  # fmt: skip
NOTES = {("quantize", "report"), ("quantize", "measure")}


@pytest.mark.parametrize(("line", "message"), LINES.values(), ids=[" ".join(key) for key in LINES])
def test_an_option_without_effect_is_refused(
    line: str, message: str, model: Path, checkpoint_path: Callable[[str], Path], cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = [{"M": str(model), "C": str(checkpoint_path("mini"))}.get(word, word) for word in line.split()]
    assert_one_line(cli(*words), message, code=2 if words[0] == "verify" else 1)
    assert list(tmp_path.iterdir()) == []


def test_every_case_of_the_table_is_tested() -> None:
    told = {(command, option) for case in USELESS for command in case.commands for option in case.options}
    assert told <= {*LINES, *PYTHON, *NOTES}


def test_the_same_in_python(model: Path, checkpoint_path: Callable[[str], Path]) -> None:
    for options, message in (
        ({"skip": ["a"]}, r"^skip leaves tensors of a checkpoint out"),
        ({"chat_template": "x"}, r"^chat_template is for a checkpoint, .*; overrides sets others"),
        ({"allow_nan": True}, r"^allow_nan is for a checkpoint"),
        ({"output_type": "q6_k", "leave_output": True}, r"^output_type and leave_output exclude each other"),
        ({"split_max_nbytes": 9, "keep_split": True}, r"^split_max_nbytes and keep_split exclude each other"),
    ):
        with pytest.raises(OptionError, match=message):
            quantize.plan_quantize(model, "o.gguf", **{"default": "f32", **options})  # type: ignore[arg-type]
    with (
        ggufx.open(model) as file,
        pytest.raises(OptionError, match=r"^dialect comes too late for a file that is open"),
    ):
        quantize.prepare(file, default="q8_0", dialect="llama.cpp")
    with pytest.raises(OptionError, match=r"^chat_template goes with form gguf"):
        merge.plan_merge("none", "none", "o", chat_template="x")
    with pytest.raises(OptionError, match=r"^ignore_metadata is for a GGUF's keys, and a hybrid has none"):
        refuse("verify", ["ignore_metadata"], "hybrid")
    with pytest.raises(OptionError, match=r"^dialect says whose type ids"):
        budget.Budget(checkpoint_path("mini"), dialect="llama.cpp")


def test_what_is_harmless_is_noted(model: Path, cli: Cli, tmp_path: Path) -> None:
    run = cli("quantize", model, tmp_path / "o.gguf", "f32", "--dry-run", "--report", tmp_path / "r.json", "--measure")
    assert run.code == 0
    for flag in ("--report", "--measure"):
        assert f"note: {flag} says what was done, which a dry run does not\n" in run.err
    for flags, note in (
        (("--imatrix", "ones"), "note: importance by 'ones' changes nothing: no type that is made here demands it"),
        (("--output-tensor-type", "f16", "--custom-q", "output=f32"), "warning: no tensor takes the type f16 asked for outpu"),
        (("--token-embedding-type", "f16", "--custom-q", "embd=f32"), "warning: no tensor takes the type f16 asked for the e"),
        (("--leave-output-tensor", "--custom-q", "output=f32"), "warning: no output.weight is left as it is"),
    ):  # fmt: skip
        run = cli("quantize", model, "f32", "--dry-run", *flags)
        assert run.code == 0, run
        assert note in run.out
    run = cli("quantize", model, "f32", "--dry-run", "--output-tensor-type", "f16", "--token-embedding-type", "f32")
    assert "warning" not in run.out


def test_one_of_several_patterns_may_match_nothing(checkpoint_path: Callable[[str], Path], cli: Cli) -> None:
    run = cli("convert", checkpoint_path("mini"), "--skip", "mtp.*", "--skip", "zz*", "--dry-run")
    assert run.code == 0
    assert "note: no tensor has a name such as zz*: nothing is left out by it" in run.out


def test_an_error_about_options_survives_a_process() -> None:
    error = OptionError("{dense} {0}: not {1}", "{x}", 3)
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "dense {x}: not 3"
    assert error.told(lambda name: f"--{name}") == "--dense {x}: not 3"


@pytest.mark.parametrize(
    ("options", "functions"),
    [
        (convert.ConvertOptions, [convert.plan_convert]), (merge.MergeOptions, [merge.plan_merge]),
        (retarget.RetargetOptions, [retarget.plan_retarget]), (quantize.PrepareOptions, [quantize.prepare]),
        (quantize.QuantizeOptions, [quantize.prepare, quantize.plan_quantize]),
    ],
)  # fmt: skip
def test_keywords_that_are_handed_on_are_those_that_are_taken(
    options: type, functions: list[Callable[..., object]]
) -> None:
    taken: dict[str, object] = {}
    for function in functions:
        hints = typing.get_type_hints(function)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                taken[parameter.name] = hints[parameter.name]
    assert typing.get_type_hints(options) == taken


# Floats -----------------------------------------------------------------------------------------------------------


def test_decoding_to_float32_needs_no_permission(model: Path, cli: Cli, tmp_path: Path) -> None:
    run = cli("quantize", model, tmp_path / "o.gguf", "F32")
    assert (run.code, run.err) == (0, "")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "o.gguf").tensors}
    for tensor in gguf.GGUFReader(model).tensors:
        assert found[tensor.name].tensor_type == gguf.GGMLQuantizationType.F32
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found[tensor.name].data.view(np.uint32), expected.view(np.uint32))
    plan = quantize.plan_quantize(model, tmp_path / "p.gguf", default="F32")
    assert all(tensor.lossless for tensor in plan.tensors)


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_what_other_floats_round_is_said(kind: str, model: Path, cli: Cli, tmp_path: Path) -> None:
    run = cli("quantize", model, tmp_path / "o.gguf", kind)
    assert run.code == 1
    assert "F32 holds its decoded values exactly, or pass --allow-requantize" in run.err
    assert run.err.endswith("nothing is written: 2 errors\n")
    run = cli("quantize", model, tmp_path / "o.gguf", "--custom-q", f"embd={kind}")
    assert run.err.endswith("nothing is written: 1 error\n")


# Outputs ----------------------------------------------------------------------------------------------------------


def test_outputs_in_a_directory_and_with_placeholders(model: Path, cli: Cli, tmp_path: Path) -> None:
    folder = f"{tmp_path}/new/"
    for words, name in (
        (("quantize", model, folder, "f32"), "Tiny-F32.gguf"),
        (("quantize", model, "f32", "-o", tmp_path / "new" / "q-{ftype}.gguf"), "q-f32.gguf"),
        (("quantize", model, "f32", "-o", tmp_path / "new" / "q-{FTYPE}.gguf"), "q-F32.gguf"),
        (("retarget", model, "-o", folder, "--target", "llama.cpp"), "Tiny-MIXED.gguf"),
        (("retarget", model, "-o", f"{folder}r-{{ftype}}.gguf", "--target", "llama.cpp"), "r-mixed.gguf"),
        (("rewrite", model, "-o", folder), "m.gguf"),
        (("rewrite", model, "-o", f"{folder}w-{{ftype}}.gguf"), "w-mixed.gguf"),
        (("split", model, folder), "m-00001-of-00001.gguf"),
        (("split", model, f"{folder}s-{{ftype}}"), "s-mixed-00001-of-00001.gguf"),
    ):
        run = cli(*words)
        assert run.code == 0, run
        (made,) = (tmp_path / "new").iterdir()
        assert made.name == name
        made.unlink()


def test_a_pipe_is_no_output(model: Path, checkpoint_path: Callable[[str], Path], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(LEGACY)
    for words in (
        ("convert", checkpoint_path("mini")), ("quantize", model, "f32"), ("rewrite", model), ("split", model),
        ("retarget", model, "--target", "llama.cpp"), ("export", model), ("imatrix", "convert", tmp_path / "i.dat"),
        ("merge", "--safetensor-path", checkpoint_path("mini"), "--gguf-path", model, "--format", "gguf"),
    ):  # fmt: skip
        run = cli(*words, "-o", "-")
        if words[0] == "merge":
            assert run.code == 1  # its sources do not fit anyway
        else:
            assert_one_line(run, "--outfile -: an output is")
    assert_one_line(
        cli("rewrite", model, "-o", "{nope}.gguf"), "--outfile {nope}.gguf: KeyError('nope') is no placeholder"
    )
    assert_one_line(cli("export", model, "-o", "{ftype}"), "--outfile {ftype}: is no file; name a directory")


def test_an_output_is_named_once(model: Path, cli: Cli) -> None:
    for words in (("split", model, "a", "-o", "b"), ("quantize", model, "a.gguf", "f32", "-o", "b")):
        assert_one_line(cli(*words), "the output is given twice", "and --outfile b")


# Importance matrices ----------------------------------------------------------------------------------------------

LEGACY = b"".join([
    struct.pack("<i", 3),
    *(
        struct.pack("<i", len(name)) + name + struct.pack("<ii", 4, 2) + struct.pack("<2f", *values)
        for name, values in ((b"z.weight", (1, 2)), (b"a.weight", (3, 4)), (b"m.weight", (5, 6)))
    ),
    struct.pack("<ii", 4, 3) + b"set",
])  # fmt: skip
"""Entries that are not in the order of their names."""


def test_a_legacy_matrix_comes_back_byte_for_byte(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(LEGACY)
    assert cli("imatrix", "convert", tmp_path / "i.dat", "-o", f"{tmp_path}/to/").code == 1  # no such folder
    (tmp_path / "to").mkdir()
    assert cli("imatrix", "convert", tmp_path / "i.dat", "-o", tmp_path / "to").code == 0
    assert list(imatrix.load(tmp_path / "to" / "i.gguf")) == ["z.weight", "a.weight", "m.weight"]
    assert cli("imatrix", "convert", tmp_path / "to" / "i.gguf", "-o", tmp_path / "back.dat").code == 0
    assert (tmp_path / "back.dat").read_bytes() == LEGACY


# Names that are not known -----------------------------------------------------------------------------------------


def test_wrong_words_get_an_answer(model: Path, checkpoint_path: Callable[[str], Path], cli: Cli) -> None:
    assert_one_line(
        cli("quantize", model, "q4km", "--dry-run"), "Invalid quantization type 'q4km'; did you mean Q4_K_M?"
    )
    assert_one_line(cli("quantize", model, "--custom-q", "a=q4km", "--dry-run"), "did you mean Q4_K?")
    with pytest.raises(UnknownType, match=r"'Q4K' is not a known type; did you mean Q4_K\?"):
        types.get("Q4K")
    with pytest.raises(UnknownType, match="12 is not the name of a type, such as 'Q4_K'"):
        types.get(12)  # type: ignore[arg-type]
    for words in (("convert", "hf://org/x"), ("inspect", "hf://org/x"), ("quantize", "hf://org/x", "q8_0")):
        assert_one_line(cli(*words), "hf://org/x: is an address, and ggufx reads files; hf download org/x gets a model")
    assert_one_line(cli("verify", "https://huggingface.co/org/x/y", "--against", "z"), "hf download org/x gets", code=2)
    assert_one_line(cli("inspect", "https://a.b/m.gguf"), "https://a.b/m.gguf: is an address, and ggufx reads files")
    assert_one_line(
        cli("convert", model), f"{model}: not a checkpoint directory, but a GGUF: `ggufx quantize` gives it other types"
    )
    with pytest.raises(GGUFError, match="but a GGUF"):
        convert.plan_convert(model)
    assert_one_line(
        cli("merge", "x-00001-of-00008.gguf", "o.gguf"), "`ggufx merge-splits x-00001-of-00008.gguf o.gguf` merges"
    )
    assert_one_line(cli("merge-splits", model, "o.gguf"), "is not split")
    run = cli("convert", checkpoint_path("mini"), "--target", "ik")
    assert run.code == 2
    assert run.err.endswith(
        "Invalid value for '--target': 'ik' is not one of 'llama.cpp', 'ik_llama.cpp', 'nisparks'.\n"
    )
    assert cli("convert", checkpoint_path("mini"), "--target", "LLAMA.CPP", "--dense", "BF16", "--dry-run").code == 0


# Help -------------------------------------------------------------------------------------------------------------


def all_commands() -> dict[str, object]:
    from typer.main import get_command

    from ggufx.cli import app

    found: dict[str, object] = {}

    def walk(command: object, words: str) -> None:
        below = getattr(command, "commands", None)
        if below is None:
            found[words] = command
        for name, item in (below or {}).items():
            walk(item, f"{words} {name}".strip())

    walk(get_command(app), "")
    return found


def test_help_has_every_command_whole_and_in_a_group(cli: Cli) -> None:
    run = cli("-h")
    assert run == cli("--help")
    assert run.code == 0
    lines = run.out.splitlines()
    assert not any("..." in line for line in lines[1:])
    assert [line[:-1] for line in lines if re.fullmatch(r"\S.*:", line)] == [
        "Options", *commands.COMMANDS, "Examples", "Exit codes",
    ]  # fmt: skip
    listed = [name for names in commands.COMMANDS.values() for name in names]
    assert sorted({words.split()[0] for words in all_commands()}) == sorted(listed)
    for name in listed:
        assert re.search(rf"^  {re.escape(name)} ", run.out, re.MULTILINE)
    for code in ("0", "1", "2", "3", "130, 143"):
        assert re.search(rf"^  {code} ", run.out, re.MULTILINE)


def test_examples_are_command_lines() -> None:
    import shlex

    found = all_commands()
    assert {*found, ""} == set(commands.EXAMPLES)
    for words, lines in commands.EXAMPLES.items():
        for line in lines:
            program, *rest = shlex.split(line.split(" > ")[0])
            name = next(name for name in found if rest[: len(name.split())] == name.split())
            assert program == "ggufx"
            assert words in ("", name)
            # Parses the options, and reads no file.
            found[name].make_context(name, rest[len(name.split()) :])  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", [["quantize"], ["convert"], ["retarget"], ["imatrix", "convert"]])
def test_help_of_a_command(words: list[str], cli: Cli) -> None:
    run = cli(*words, "-h")
    assert run.code == 0
    assert "\nExamples:\n  ggufx " in run.out
    assert "-q, --quiet" in run.out
    assert (words[0] != "imatrix") == ("\nOutput:\n" in run.out)
    assert max(len(line) for line in run.out.split("Examples:")[0].splitlines()) <= 80
    options = set(re.findall(r"--[a-z][\w-]+", run.out.split("Examples:")[0]))
    for param in all_commands()[" ".join(words)].params:  # type: ignore[attr-defined]
        assert param.hidden or set(param.opts) & (options | {param.name}), param.name


def test_versions_and_silence(model: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("-V") == Run(0, f"ggufx {ggufx.__version__}\n", "")
    for words in (("-q", "quantize"), ("quantize", "-q"), ("quantize", "--quiet")):
        run = cli(*words, model, tmp_path / "o.gguf", "f32", "--overwrite", "--imatrix", "ones")
        assert run == Run(0, "", "")
    assert cli("quantize", "-q", model, "q4km", "-o", "x").err.startswith("error: ")
    assert cli("types", "-q", "--json").out.startswith("[")
    assert cli("types", "-q").out == ""
    assert cli("types").out != ""
    run = cli("quantize", "-q", model, tmp_path / "p.gguf", "q8_0", "--allow-requantize")
    assert run.out == ""
    assert run.err.startswith("warning: ")


def test_a_shell_completes_names(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from ggufx.cli import app

    def completed(line: str) -> list[str]:
        monkeypatch.setenv("_GGUFX_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        with pytest.raises(SystemExit):
            app(prog_name="ggufx")
        return capsys.readouterr().out.split()

    assert completed("ggufx convert C --target ") == ["llama.cpp", "ik_llama.cpp", "nisparks"]
    assert completed("ggufx quantize m.gguf Q4_K") == ["Q4_K", "Q4_K_S", "Q4_K_M"]
    assert completed("ggufx measure m.gguf --types q8_0,iq3_k") == ["q8_0,iq3_k", "q8_0,iq3_kt", "q8_0,iq3_ks"]
    assert completed("ggufx recipe show deepseek-v3") == ["deepseek-v3-iq2_xxs"]
    assert "merge-splits" in completed("ggufx mer")
    monkeypatch.delenv("_GGUFX_COMPLETE")
    assert "--install-completion" in run_process("--help").out


# Tables -----------------------------------------------------------------------------------------------------------


def test_tables_fit_the_terminal(model: Path, tmp_path: Path) -> None:
    import fcntl
    import os
    import pty
    import subprocess
    import sys
    import termios

    def shown(*words: object) -> list[str]:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        process = subprocess.Popen([sys.executable, "-m", "ggufx", *map(str, words)], stdout=theirs, stderr=theirs)
        os.close(theirs)
        data = b""
        try:
            while read := os.read(ours, 1 << 16):
                data += read
        except OSError:
            pass  # the end of a terminal
        os.close(ours)
        assert process.wait() == 0
        return re.sub(r"\x1b\[[0-9;]*m", "", data.decode()).splitlines()

    lines = shown("inspect", model)
    (template,) = [line for line in lines if line.startswith("tokenizer.chat_template")]
    assert (len(template), template[-1]) == (80, "…")
    assert any(line.split() == ["blk.0.ffn_down.weight", "[4,", "256]", "Q4_0", "576", "4.5000"] for line in lines)
    lines = shown("types")
    assert lines[0].split() == ["type", "ids", "block", "bytes", "header", "bpw", "decode"]
    assert all(len(line) <= 80 for line in lines[:-1])
    assert lines[-1].startswith(
        "(too narrow for: encode, native pack, kernel, CUDA, torch, byte-compatible; a pipe shows all"
    )
    whole = run_process("inspect", model).out
    assert f'"{"t" * 2000}"\n' in whole


def test_a_python_error_names_the_parameter(checkpoint_path: Callable[[str], Path]) -> None:
    with pytest.raises(PlanError, match=r"^dense f64 is not supported; supported: q8_0, bf16, f32"):
        convert.plan_convert(checkpoint_path("mini"), dense="f64")
    with pytest.raises(PlanError, match=r"^outtype q8_0 is not supported; supported: native"):
        convert.plan_convert(checkpoint_path("mini"), outtype="q8_0")
    with pytest.raises(PlanError, match=r"^output_path -: an output is a directory"):
        merge.directory("-", parameter="output_path")

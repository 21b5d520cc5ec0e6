"""Commands as the command line has them: help in groups and with examples, spellings that all share, errors in its words."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from ggufx import options, terminal, types
from ggufx.errors import GGUFError, OptionError, PlanError

__all__ = ["COMMANDS", "EXAMPLES", "EXIT_CODES", "OPTIONS", "App", "Command", "Group", "explain"]

COMMANDS: Final[Mapping[str, tuple[str, ...]]] = {
    "Convert": ("convert", "retarget", "export", "merge"),
    "Quantize": ("quantize", "recipe", "imatrix", "measure"),
    "Look and prove": ("inspect", "verify", "diff", "types"),
    "Edit": ("set", "rewrite", "split", "merge-splits"),
    "This installation": ("warmup", "selftest"),
}
"""Groups of commands in the help; one that is in none is listed under "Commands"."""

OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "Types": (
        "mix", "recipe", "custom_q", "tensor_type", "tensor_type_file", "outtype", "dense", "plain", "pure",
        "output_tensor_type", "token_embedding_type", "leave_output_tensor", "no_fallback", "allow_requantize",
    ),
    "A size instead of types": ("target_size", "target_bpw", "candidates", "per", "sample_len"),
    "Search": ("imatrix", "effort", "objective", "device"),
    "Source": ("safetensor_path", "gguf_path", "dialect", "mtp", "skip", "allow_nan"),
    "Output": (
        "outfile", "output_path", "form", "target", "split_max_size", "split_max_tensors", "no_tensor_first_split",
        "keep_split", "model_name", "chat_template_file", "override_kv", "stamp", "overwrite", "resume",
    ),
    "This run": ("threads", "dry_run", "as_json", "measure_errors", "report", "verbose", "quiet", "help"),
}  # fmt: skip
"""Groups of options, by parameters' names, in the help of a command that has many; others are listed under "Options"."""
_MANY: Final = 12

EXAMPLES: Final[Mapping[str, tuple[str, ...]]] = {
    "": (
        "ggufx convert DeepSeek-V4-Flash --outfile v4.gguf",
        "ggufx quantize v4.gguf v4-iq2_xxs.gguf --recipe deepseek-v4-flash-iq2_xxs --imatrix imatrix.gguf",
        "ggufx verify v4.gguf --against DeepSeek-V4-Flash",
    ),
    "convert": (
        "ggufx convert DeepSeek-V4-Flash -o v4.gguf",
        "ggufx convert DeepSeek-V4-Flash --target llama.cpp --dense q8_0 -o '{ftype}.gguf' --dry-run",
    ),
    "retarget": ("ggufx retarget v4.gguf --target llama.cpp -o v4-{ftype}.gguf",),
    "export": ("ggufx export v4.gguf -o checkpoint/",),
    "merge": ("ggufx merge --safetensor-path DeepSeek-V3 --gguf-path experts/ --output-path hybrid/",),
    "quantize": (
        "ggufx quantize model.gguf model-q4.gguf Q4_K_M",
        "ggufx quantize model.gguf -o small.gguf --target-size 20G --imatrix imatrix.gguf",
        "ggufx quantize model-q4.gguf model-f32.gguf F32",
    ),
    "recipe list": ("ggufx recipe list",),
    "recipe show": ("ggufx recipe show Q4_K_M --for model.gguf > my.recipe",),
    "recipe lint": ("ggufx recipe lint my.recipe model.gguf",),
    "recipe fit": ("ggufx recipe fit model.gguf --target-bpw 4.5 > my.recipe",),
    "recipe from-gguf": ("ggufx recipe from-gguf model-q4.gguf > my.recipe",),
    "imatrix info": ("ggufx imatrix info imatrix.dat",),
    "imatrix convert": ("ggufx imatrix convert imatrix.dat -o imatrix.gguf",),
    "measure": ("ggufx measure model.gguf --types iq2_ks,q4_k --tensors 'blk.0.*' --plot error.png",),
    "inspect": ("ggufx inspect model.gguf", "ggufx inspect model.gguf --tensors 'blk.0.*' --json"),
    "verify": ("ggufx verify v4.gguf --against DeepSeek-V4-Flash --exact",),
    "diff": ("ggufx diff first.gguf second.gguf",),
    "types": ("ggufx types",),
    "set": (
        "ggufx set model.gguf general.name='My model' --remove general.url",
        "ggufx set model.gguf tokenizer.chat_template=str:@template.jinja",
    ),
    "rewrite": ("ggufx rewrite model-00001-of-00003.gguf -o model.gguf",),
    "split": ("ggufx split model.gguf parts/model --split-max-size 50G",),
    "merge-splits": ("ggufx merge-splits parts/model-00001-of-00003.gguf model.gguf",),
    "warmup": ("ggufx warmup Q4_K IQ2_XXS",),
    "selftest": ("ggufx selftest Q4_K",),
}
"""What to type, by command; the empty name is the program's."""

EXIT_CODES: Final[tuple[tuple[str, str], ...]] = (
    ("0", "done; verify: nothing lost, or rounded within bounds; diff: the same"),
    ("1", "an error, told in one line; verify: not verified; diff: different; selftest: a law broken"),
    ("2", "the command line cannot be read; verify, diff: trouble, such as a missing file"),
    ("3", "with --no-fallback: a type does not fit the rows of a tensor"),
    ("130, 143", "stopped by Ctrl-C, by SIGTERM; the same command goes on"),
)

_COMPARING: Final = ("verify", "diff")
_PARAMETERS: Final[Mapping[str, str]] = {
    "tensors": "only",
    "split_max_size": "split_max_nbytes", "output_tensor_type": "output_type", "token_embedding_type": "embedding_type",
    "leave_output_tensor": "leave_output", "allow_key": "allow_keys", "measure_errors": "measure", "no_fallback": "fallback",
    "candidates": "type_names", "chat_template_file": "chat_template", "override_kv": "overrides",
}  # fmt: skip
"""Of options whose parameter has another name in the functions: that name."""

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print errors and warnings only, and what --json and the like ask for."),
]


def explain(error: BaseException) -> str:
    """Return an error that input can cause as one line."""
    if isinstance(error, OSError) and not isinstance(error, GGUFError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, UnicodeDecodeError):
        return f"a text file is not UTF-8 ({error})"
    return str(error)


def _words(context: Any) -> str:
    """Return the words of a command after the program's name."""
    names: list[str] = []
    while context.parent is not None:
        names.insert(0, context.info_name)
        context = context.parent
    return " ".join(names)


def _speller(command: Any) -> Callable[[str], str]:
    """Return what writes a function's parameter as the option of a command."""
    flags = {
        _PARAMETERS.get(param.name, param.name): next(flag for flag in param.opts if flag.startswith("--"))
        for param in command.params
        if param.param_type_name == "option"
    }
    return lambda name: "TYPE" if name == "default" else flags.get(name, f"--{name.replace('_', '-')}")


@contextmanager
def _spelled(command: Any) -> Iterator[None]:
    """Say errors about options in the command line's words; end comparing commands with 2 where they cannot compare."""
    try:
        yield
    except (GGUFError, OSError, UnicodeDecodeError) as error:
        told = error.told(_speller(command)) if isinstance(error, OptionError) else explain(error)
        if command.name in _COMPARING:
            terminal.fail(told, 2)
        if isinstance(error, OptionError):
            raise PlanError(told) from None
        raise


def _write_examples(formatter: Any, words: str) -> None:
    if words in EXAMPLES:
        with formatter.section("Examples"):
            for line in EXAMPLES[words]:
                formatter.write(f"  {line}\n")


class Command(TyperCommand):
    """A command: its help has its options in groups and examples, and options without effect are refused."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments; a value that is refused is told without the words of the library that refuses it."""
        address = next((arg for arg in args if re.match(r"(hf|https?)://", arg)), None)
        if address is not None:
            name = address.removeprefix("hf://").removeprefix("https://huggingface.co/")
            got = f"; hf download {'/'.join(name.split('/')[:2])} gets a model" if "://" not in name else ""
            terminal.fail(f"{address}: is an address, and ggufx reads files{got}", 2 if self.name in _COMPARING else 1)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.replace("Value error, ", "")
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command, if every option that was given has an effect."""
        asked = [name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]
        with _spelled(self):
            for note in options.refuse(_words(ctx), [_PARAMETERS.get(name, name) for name in asked]):
                terminal.err.print(f"note: {note.told(_speller(self))}", markup=False)
            return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, in groups where they are many."""
        records = [(param, param.get_help_record(ctx)) for param in self.get_params(ctx)]
        shown = [(param, record) for param, record in records if record is not None]
        arguments = [record for param, record in shown if param.param_type_name == "argument"]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(arguments)
        left = {param.name: record for param, record in shown if param.param_type_name == "option"}
        for title, names in OPTIONS.items() if len(left) >= _MANY else ():
            group = [left.pop(name) for name in names if name in left]
            if group:
                with formatter.section(title):
                    formatter.write_dl(group)
        if left:
            with formatter.section("Options"):
                formatter.write_dl(list(left.values()))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write examples."""
        _write_examples(formatter, _words(ctx))


class Group(TyperGroup):
    """A program or a group of commands, which its help lists by what they are for."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands with the whole first sentence of their help."""
        found = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        left = {
            name: (command.short_help or (command.help or "").split("\n\n")[0]).replace("\n", " ")
            for name, command in found.items()
            if command is not None and not command.hidden
        }
        for title, names in COMMANDS.items() if ctx.parent is None else ():
            group = [(name, left.pop(name)) for name in names if name in left]
            if group:
                with formatter.section(title):
                    formatter.write_dl(group)
        if left:
            with formatter.section("Commands"):
                formatter.write_dl(list(left.items()))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write examples and the exit codes."""
        _write_examples(formatter, _words(ctx))
        if ctx.parent is None:
            with formatter.section("Exit codes"):
                formatter.write_dl(EXIT_CODES)


class App(typer.Typer):
    """A program or a group of commands that are all of :class:`Command`, and have ``--quiet``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            cls=Group, no_args_is_help=True, rich_markup_mode=None,
            context_settings={"help_option_names": ["--help", "-h"]}, **settings,
        )  # fmt: skip

    def command(  # type: ignore[override]
        self, name: str | None = None, **settings: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Make a command of a function."""
        register = super().command(name, cls=Command, **settings)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_completed(function))
            return function

        return decorate


def _type_names(incomplete: str) -> list[str]:
    """Complete the last of types separated by commas, in the case that was begun with."""
    before, comma, begun = incomplete.rpartition(",")
    names = [codec.name for codec in types.all_codecs()]
    if not begun.isupper():
        names = [name.lower() for name in names]
    return [f"{before}{comma}{name}" for name in names if name.startswith(begun)]


def _types_and_mixes(incomplete: str) -> list[str]:
    from ggufx import mixes

    found = dict.fromkeys([*(codec.name for codec in types.all_codecs()), *mixes.MIXES])
    return [name for name in found if name.startswith(incomplete.upper())]


def _recipes(incomplete: str) -> list[str]:
    from ggufx import recipe

    return [name for name in recipe.shipped() if name.startswith(incomplete)]


_COMPLETIONS: Final[Mapping[str, Callable[[str], list[str]]]] = {
    "names": _type_names, "type_names": _type_names, "candidates": _type_names, "output_tensor_type": _type_names,
    "token_embedding_type": _type_names, "first": _types_and_mixes, "second": _types_and_mixes, "recipe": _recipes,
}  # fmt: skip
"""What a shell offers for the values of parameters; choices offer themselves, and a shell its files where nothing fits."""


_METAVARS: Final[Mapping[str, str]] = {
    "skip": "GLOB", "allow_key": "GLOB", "tensors": "GLOB", "custom_q": "RE=TYPE,...", "tensor_type": "RE=TYPE",
    "tensor_type_file": "FILE", "candidates": "TYPE,...", "type_names": "TYPE,...", "output_tensor_type": "TYPE",
    "token_embedding_type": "TYPE", "recipe": "RECIPE", "imatrix": "FILE", "report": "FILE", "chat_template_file": "FILE",
    "remove": "KEY", "model_name": "NAME", "device": "DEVICE", "split_max_size": "N(M|G|MiB|GiB)", "split_max_tensors": "N",
    "target_bpw": "N", "sample_len": "N", "max_rows": "N", "limit": "N", "seed": "N", "threads": "N",
}  # fmt: skip
"""What stands for the value of an option in the help, where it is not a path or a choice."""


def _completed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function that is a command what all have: ``--quiet``, choices in any case, completion of names."""

    def run(*arguments: Any, quiet: bool, **keywords: Any) -> Any:
        if quiet:
            terminal.hush(True)
        return function(*arguments, **keywords)

    signature = inspect.signature(function, eval_str=True)
    added = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet)
    parameters = [*signature.parameters.values(), added]
    for parameter in parameters:
        for info in getattr(parameter.annotation, "__metadata__", ()):
            info.case_sensitive = False
            info.metavar = info.metavar or _METAVARS.get(parameter.name)
            info.autocompletion = info.autocompletion or _COMPLETIONS.get(parameter.name)
    functools.update_wrapper(run, function)
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # type: ignore[attr-defined]
    return run

"""Triton's interpreter, without doing again for every call of a function what a launch has done."""

from __future__ import annotations

from typing import Any


def quicken() -> None:
    """Let a launch exchange the language's functions for the interpreter's once; by default every call inside does it again.

    That is a fifth of the time of kernels with many small functions. Does nothing where Triton's insides are other ones.
    """
    from triton.runtime import interpreter

    plain = getattr(interpreter, "_patch_lang", None)
    if plain is None or not hasattr(interpreter, "_LangPatchScope") or hasattr(plain, "once"):
        return
    languages: dict[int, frozenset[str]] = {}
    exchanged: set[str] = set()

    def patch_lang(function: Any) -> Any:
        names = function.__globals__
        if id(names) not in languages:
            both = (interpreter.tl, interpreter.tl.core)
            languages[id(names)] = frozenset(v.__name__ for v in names.values() if any(v is one for one in both))
        found = languages[id(names)]
        if found <= exchanged:
            return interpreter._LangPatchScope()
        scope, outermost = plain(function), not exchanged
        exchanged.update(found)
        if outermost:
            restore = scope.restore

            def leave() -> None:
                exchanged.clear()
                restore()

            scope.restore = leave
        return scope

    patch_lang.once = True  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_lang

"""The one table of options.

Each option has a name (for `torch.compile(..., options={...})`), an environment variable
(`GCU_COMPILE_<NAME>`), a type, a default and a sentence of help. The word nearest to the code wins:
`options=` beats the environment, which beats the default.

    >>> resolve({"target": "host"}).target
    'host'
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gcu_compile.errors import InvalidValueError, UnknownNameError

ENV_PREFIX = "GCU_COMPILE_"
TARGETS = ("auto", "host", "cuda", "gcu300", "gcu400")
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def _option(default: Any, help: str, *, choices: tuple[str, ...] = (), changes_code: bool = False):
    """A field of `Options`. `changes_code`: part of the compile cache's key."""
    return field(default=default, metadata={"help": help, "choices": choices, "changes_code": changes_code})


def default_cache_dir() -> str:
    """`$XDG_CACHE_HOME/gcu_compile`, else `~/.cache/gcu_compile`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "gcu_compile")


@dataclass(frozen=True)
class Options:
    """Effective options of one compilation. Build it with `resolve`, which checks every value."""

    target: str = _option(
        "auto",
        "What to compile for; auto takes the device of the graph's tensors.",
        choices=TARGETS,
        changes_code=True,
    )
    disable_rules: tuple[str, ...] = _option((), "Lowering rules switched off, by name.", changes_code=True)
    enable_rules: tuple[str, ...] = _option((), "Opt-in rules switched on, by name.", changes_code=True)
    disable_steps: tuple[str, ...] = _option((), "Pipeline steps switched off, by name.", changes_code=True)
    disable_matches: tuple[str, ...] = _option(
        (),
        "Single matches switched off, as rule@index (in every graph) or rule@graph.index (what bisect finds).",
        changes_code=True,
    )
    inductor: bool = _option(
        True, "Generate code with Inductor; off runs the lowered graph eagerly.", changes_code=True
    )
    post_processing_dtype: str = _option(
        "original",
        "Precision of the logits chain: the model's own, or upstream vLLM's float32 copy.",
        choices=("original", "float32"),
        changes_code=True,
    )
    check_invariants: bool = _option(True, "Validate the graph after every lowering step.")
    shadow: str = _option(
        "off",
        "Run each fused operation's eager meaning beside it and compare.",
        choices=("off", "eager", "float64"),
        changes_code=True,
    )
    shadow_dir: str = _option("", "Folder for the inputs of a shadow breach; empty: do not save.")
    dump: str = _option("", "Folder for an ordered, diffable dump of every compilation; empty: none.")
    cache: bool = _option(True, "Keep and reuse compiled artifacts.")
    cache_dir: str = _option("", "Where caches live; empty: the user's cache folder.")
    host_isa: str = _option(
        "auto",
        "Instruction set of the host kernels.",
        choices=("auto", "amx", "avx512", "avx2", "portable"),
        changes_code=True,
    )
    attention: str = _option(
        "auto",
        "vLLM on the host: whose attention serves caches that both can read; auto takes ours.",
        choices=("auto", "gcu", "vllm"),
        changes_code=True,
    )
    linear: str = _option(
        "auto",
        "vLLM on the host: whose kernel multiplies with unquantised weights of bfloat16; auto takes ours where it was "
        "measured to be the faster.",
        choices=("auto", "gcu", "vllm"),
        changes_code=True,
    )
    replay: bool = _option(
        True, "vLLM on the host: steps of few tokens are captured once and replayed without Python."
    )
    emulate: str = _option(
        "", "Emulate this card in host memory.", choices=("", "gcu300", "gcu400"), changes_code=True
    )
    target_profile: str = _option(
        "", "YAML file that overrides facts of the target profile.", changes_code=True
    )
    log_stats: bool = _option(False, "vLLM: log engine statistics (behaviour 1).")
    dump_on_error: bool = _option(False, "vLLM: dump a step's inputs when it fails (behaviour 7).")
    debug_checks: bool = _option(False, "Check block tables and indices at run time (slow).", changes_code=True)

    def effective_cache_dir(self) -> Path:
        """The folder that caches live in; not created here."""
        return Path(self.cache_dir or default_cache_dir())

    def code_key(self) -> dict[str, Any]:
        """The options that change generated code, by name: an ingredient of the cache key."""
        values = asdict(self)
        return {f.name: values[f.name] for f in fields(self) if f.metadata["changes_code"]}


NAMES = tuple(f.name for f in fields(Options))


def env_name(option: str) -> str:
    """`GCU_COMPILE_DUMP` for `dump`."""
    return ENV_PREFIX + option.upper()


def watched(*variables: str) -> Callable[[], tuple]:
    """A function that gives the values of environment variables, as something to compare and to hash.

    `os.environ.get` takes 1 us a name, most of it an exception within: more than a small kernel runs. The dict that
    `os.environ` keeps takes a twentieth of that.
    """
    held = getattr(os.environ, "_data", os.environ)
    encode = getattr(os.environ, "encodekey", str)
    keys = tuple(map(encode, variables))
    return lambda: tuple(map(held.get, keys))


_DEBUG_CHECKS = watched("GCU_COMPILE_DEBUG_CHECKS")


def debug_checks() -> bool:
    """Option `debug_checks` of the environment, fast enough to be asked on every call of a kernel."""
    return _debug_checks_for(_DEBUG_CHECKS())


@functools.cache
def _debug_checks_for(environ: tuple) -> bool:
    return resolve().debug_checks


def resolve(given: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Options:
    """Effective options from `given` (what the user wrote) over the environment over the defaults.

    Raises:
        UnknownNameError: an option, or an environment variable with our prefix, that does not exist.
        InvalidValueError: a value of the wrong type, or not among the choices.
    """
    environ = os.environ if environ is None else environ
    by_env = {env_name(name): name for name in NAMES}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        if variable not in by_env:
            raise UnknownNameError("environment variable", variable, by_env)
        values[by_env[variable]], sources[by_env[variable]] = text, variable
    for name, value in (given or {}).items():
        if name not in NAMES:
            raise UnknownNameError("option", name, NAMES, "options=")
        values[name], sources[name] = value, "options="
    specs = {f.name: f for f in fields(Options)}
    return Options(**{name: _parse(specs[name], value, sources[name]) for name, value in values.items()})


def _parse(spec: Any, value: Any, source: str) -> Any:
    """`value` as the type of `spec`'s default; text is what the environment can hold."""
    default, choices = spec.default, spec.metadata["choices"]
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        if str(value).lower() in TRUE + FALSE:
            return str(value).lower() in TRUE
        raise InvalidValueError(f"option {spec.name}", value, "a boolean (1/0, true/false)", source)
    if isinstance(default, tuple):
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) for p in parts):
            raise InvalidValueError(f"option {spec.name}", value, "a list of names", source)
        return tuple(p.strip() for p in parts if p.strip())
    if spec.name == "shadow" and isinstance(value, (bool, str)) and str(value).lower() in TRUE + FALSE:
        return "eager" if str(value).lower() in TRUE else "off"
    if not isinstance(value, (str, os.PathLike)):
        raise InvalidValueError(f"option {spec.name}", value, "text", source)
    text = os.fspath(value)
    if choices and text not in choices:
        raise InvalidValueError(f"option {spec.name}", value, "one of " + ", ".join(map(repr, choices)), source)
    return text

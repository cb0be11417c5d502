"""gcu-compile: `torch.compile(backend="gcu")` for Enflame GCU accelerators, and for the CPU beside them.

Importing this package imports neither vLLM nor torch_gcu, and registers nothing: the entry point
`torch_dynamo_backends` makes `backend="gcu"` valid by itself.
"""

__version__ = "0.1.0"

__all__ = ["__version__", "explain"]


def explain(fn, *args, options=None, **kwargs):
    """Compile `fn` for `args` and report what was fused, skipped (with the reason) and generated.

    See `gcu_compile.debug.explain.explain` for the report's fields.
    """
    from gcu_compile.debug.explain import explain as run

    return run(fn, *args, options=options, **kwargs)

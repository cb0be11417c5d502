"""Reports of an engine that starts from vLLM's cache: it compiles nothing, and tells what the cold start told.

vLLM keeps compiled code under a hash of its configuration, and calls no compiler of ours when it finds it. What the
cold start learned is kept in our cache under the same hash.
"""

from __future__ import annotations

from dataclasses import asdict

from gcu_compile import backend
from gcu_compile.cache.key import code_ingredients, key_of
from gcu_compile.cache.store import Entry, Store
from gcu_compile.lowering.context import GraphReport
from gcu_compile.options import resolve
from vllm_integration.behaviours import log


def keep_or_recall(vllm_config) -> None:
    """After a cold start: keep the reports of all pieces. After one from vLLM's cache: take them back."""
    options = resolve()
    if not options.cache:
        return
    graph = {"name": f"vLLM {vllm_config.model_config.model}", "hash": vllm_config.compute_hash()}
    ingredients = {**code_ingredients(options, "host"), "graph": graph}
    store, key = Store(options.effective_cache_dir()), key_of(ingredients)
    if backend.reports:
        kernels = [[asdict(kernel) for kernel in graph] for one in backend.recordings for graph in one.kernels]
        reports = [report.to_json() for report in backend.reports]
        total = sum(one.seconds.get("total", 0.0) for one in backend.recordings if one.state != "hit")
        store.save(Entry(key, ingredients, reports=reports, kernels=kernels, seconds={"total": total}))
        return
    entry, reason = store.load(key)
    if entry is None:
        log.info("Compiled code came from vLLM's cache; its report is not known: %s.", reason)
        return
    backend.reports.extend(GraphReport.from_json(report) for report in entry.reports)

"""What a batch's requests ask for, as arguments of `gcu::sample`: SamplingMetadata and the input batch's host side.

Everything is read on the host, where vLLM keeps it, and goes to the device once: no value is read back from a device,
so that a step waits for nothing but its tokens. What nobody asks for is absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_integration import versions

KNOWN_PROCESSORS = (LogitBiasLogitsProcessor, MinPLogitsProcessor, MinTokensLogitsProcessor)
PER_ROW = ("temperature", "top_k", "top_p")
PENALTIES = ("repetition", "frequency", "presence")


@dataclass(frozen=True)
class Rows:
    """Of each row of logits its request and how many of the request's draft tokens stand before it: [rows] both.

    Without drafts row r is request r: `Rows.plain`.
    """

    request: np.ndarray
    place: np.ndarray
    expanded: bool = True

    @classmethod
    def plain(cls, rows: int) -> Rows:
        return cls(np.arange(rows), np.zeros(rows, dtype=np.int64), False)

    def take(self, which: np.ndarray) -> Rows:
        return Rows(self.request[which], self.place[which])

    def of(self, value: torch.Tensor | None) -> torch.Tensor | None:
        """A tensor per request as one per row."""
        if value is None or not self.expanded:
            return value
        return value[torch.from_numpy(self.request).to(value.device)]

    def outputs(self, metadata: SamplingMetadata) -> list[list[int]]:
        """Of each row the tokens before it that its request wrote, drafts among them."""
        if not self.expanded:
            return metadata.output_token_ids
        drafts = metadata.spec_token_ids or [[]] * (int(self.request.max(initial=-1)) + 1)
        pairs = zip(self.request.tolist(), self.place.tolist(), strict=True)
        return [[*metadata.output_token_ids[owner], *drafts[owner][:before]] for owner, before in pairs]


class Settings:
    """Makes the arguments; keeps each request's history from step to step.

    Args:
        runner: the model runner, whose input batch has prompts and penalties on the host.
    """

    def __init__(self, runner: Any):
        self.runner = runner
        self.histories: dict[str, History] = {}

    def __call__(self, metadata: SamplingMetadata, logits: torch.Tensor, rows: Rows) -> dict[str, torch.Tensor]:
        """Arguments for `logits` [rows, vocab], on its device."""
        found = {name: rows.of(value) for name in PER_ROW if (value := getattr(metadata, name)) is not None}
        if metadata.allowed_token_ids_mask is not None:
            found["forbidden"] = rows.of(metadata.allowed_token_ids_mask)
        words = metadata.bad_words_token_ids
        outputs = rows.outputs(metadata) if words or not metadata.no_penalties else []
        biases = Biases(rows)
        if words:
            biases.forbid_words(words, outputs)
        for processor in (*metadata.logitsprocs.argmax_invariant, *metadata.logitsprocs.non_argmax_invariant):
            if isinstance(processor, MinPLogitsProcessor) and processor.min_p_count:
                found["min_p"] = rows.of(processor.min_p.flatten())
            elif isinstance(processor, LogitBiasLogitsProcessor) and processor.biases:
                biases.add(processor.biases)
            elif isinstance(processor, MinTokensLogitsProcessor) and processor.min_toks:
                biases.forbid_stops(processor.min_toks)
        if biases.rows:
            found |= biases.tensors(logits, found.get("forbidden"))
        if not metadata.no_penalties:
            found |= self.history(outputs, rows, *logits.shape[1:], device=logits.device)
        return found

    def history(self, outputs: list[list[int]], rows: Rows, vocab: int, device: torch.device):
        """Tokens of prompt and output with their counts in the output, for the rows that have a penalty."""
        batch = self.runner.input_batch
        penalties = {name: getattr(batch, f"{name}_penalties_cpu")[rows.request] for name in PENALTIES}
        asked = (penalties["repetition"] != 1) | (penalties["frequency"] != 0) | (penalties["presence"] != 0)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        lengths = np.zeros(len(rows.request), dtype=np.int64)
        for row in np.flatnonzero(asked):
            owner = rows.request[row]
            prompt = batch.token_ids_cpu[owner, : batch.num_prompt_tokens[owner]]
            found.append(self.counted(batch.req_ids[owner], prompt, outputs[row], vocab))
            lengths[row] = len(found[-1][0])
        if len(self.histories) > 2 * len(batch.req_ids) + 16:
            self.histories = {name: self.histories[name] for name in batch.req_ids if name in self.histories}
        parts = zip(*found, strict=True) if found else ([np.zeros(0)], [np.zeros(0)])
        ids, counts = (torch.from_numpy(np.concatenate(part).astype(np.int32)) for part in parts)
        offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
        lists = {"history_offsets": offsets, "history_ids": ids, "history_counts": counts}
        lists |= {name: torch.from_numpy(value) for name, value in penalties.items()}
        return {name: value.to(device, non_blocking=True) for name, value in lists.items()}

    def counted(self, request: str, prompt: np.ndarray, output: list[int], vocab: int):
        """Ascending ids and their counts in the output, from what was counted in the step before."""
        history = self.histories.get(request)
        if history is None or not history.goes_on(prompt, output):
            history = self.histories[request] = History(prompt, vocab)
        return history.after(output)


class History:
    """The tokens of one request, counted up to some place of its output."""

    def __init__(self, prompt: np.ndarray, vocab: int):
        self.prompt, self.vocab, self.output = len(prompt), vocab, []
        self.ids = np.unique(prompt[(prompt >= 0) & (prompt < vocab)]).astype(np.int64)
        self.counts = np.zeros(len(self.ids), dtype=np.int64)

    def goes_on(self, prompt: np.ndarray, output: list[int]) -> bool:
        """Whether `output` is what was counted and more. Draft tokens that were refused make it another one."""
        return self.prompt == len(prompt) and output[: len(self.output)] == self.output

    def after(self, output: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and counts with the rest of `output`; negative ids are places whose token is not known yet."""
        new = output[len(self.output) :]
        known = np.array([token for token in new if 0 <= token < self.vocab], dtype=np.int64)
        if len(known):
            ids, times = np.unique(known, return_counts=True)
            missing = ids[~np.isin(ids, self.ids, assume_unique=True)]
            at = np.searchsorted(self.ids, missing)
            self.ids, self.counts = np.insert(self.ids, at, missing), np.insert(self.counts, at, 0)
            self.counts[np.searchsorted(self.ids, ids)] += times
        self.output = list(output)
        return self.ids, self.counts


class Biases:
    """(row, token, value) triples; -inf forbids. `restored`: stop tokens that come back if a row has nothing else."""

    def __init__(self, rows: Rows):
        self.of = rows
        self.rows: list[int] = []
        self.ids: list[int] = []
        self.values: list[float] = []
        self.restored: list[int] = []

    def forbid_words(self, words: dict[int, list[list[int]]], outputs: list[list[int]]) -> None:
        """The last token of each bad word whose beginning was just written."""
        for row, owner in enumerate(self.of.request.tolist()):
            for word in words.get(owner, ()):
                begun = len(word) == 1 or outputs[row][1 - len(word) :] == word[:-1]
                if begun and len(word) <= len(outputs[row]) + 1:
                    self._append(row, [word[-1]], -np.inf)

    def add(self, biases: dict[int, dict[int, float]]) -> None:
        for row, owner in enumerate(self.of.request.tolist()):
            for token, value in biases.get(owner, {}).items():
                self._append(row, [token], value)

    def forbid_stops(self, entries: dict[int, tuple]) -> None:
        """Stop tokens of requests that are too short yet, drafts counted."""
        for row, (owner, before) in enumerate(zip(self.of.request.tolist(), self.of.place.tolist(), strict=True)):
            if owner not in entries:
                continue
            least, output, stops, restores = versions.stop_entry(entries[owner])
            if len(output) + before < least:
                if restores:
                    self.restored += range(len(self.rows), len(self.rows) + len(stops))
                self._append(row, stops, -np.inf)

    def _append(self, row: int, ids: Any, value: float) -> None:
        self.rows += [row] * len(ids)
        self.ids += ids
        self.values += [value] * len(ids)

    def tensors(self, logits: torch.Tensor, forbidden: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """As offsets and flat lists in order of row, then id; on the device of `logits`."""
        rows, ids = np.array(self.rows), np.array(self.ids)
        order = np.lexsort((ids, rows))
        offsets = np.searchsorted(rows[order], np.arange(len(logits) + 1))
        found = {
            "bias_offsets": torch.from_numpy(offsets.astype(np.int64)),
            "bias_ids": torch.from_numpy(ids[order].astype(np.int32)),
            "bias_values": torch.from_numpy(np.array(self.values, dtype=np.float32)[order]),
        }
        found = {name: value.to(logits.device, non_blocking=True) for name, value in found.items()}
        if self.restored:
            found["bias_values"] = self._restore(found["bias_values"], rows, ids, order, logits, forbidden)
        return found

    def _restore(self, values, rows, ids, order, logits, forbidden):
        """`values` with 0 for the stop tokens of rows whose grammar allows nothing else, as vLLM does. No read-back."""
        which, row_of = np.unique(rows[self.restored], return_inverse=True)
        to = {"device": logits.device, "non_blocking": True}
        left = logits[torch.from_numpy(which).to(**to)]
        if forbidden is not None:
            left = left.masked_fill(forbidden[torch.from_numpy(which).to(**to)], -torch.inf)
        banned = np.flatnonzero(np.isin(rows, which) & np.isneginf(self.values))
        at = torch.from_numpy(np.searchsorted(which, rows[banned])).to(**to), torch.from_numpy(ids[banned]).to(**to)
        left = left.index_put(at, torch.tensor(-torch.inf, dtype=left.dtype, device=left.device))
        empty = ~(left > -torch.inf).any(dim=-1)
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        again = torch.where(empty[torch.from_numpy(row_of).to(**to)], 0.0, -torch.inf)
        return values.index_put((torch.from_numpy(place[self.restored]).to(**to),), again)

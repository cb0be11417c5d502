"""GPTQ by llmcompressor. A script for the environment that `gptq.py` makes: it imports nothing of this project.

    python gptq_worker.py JOB.json

JOB.json: `model`, a checkpoint folder; `out`, the folder to write; `weights`, the weights' QuantizationArgs of
compressed-tensors; `activations`, those of the activations or null; `ignore`, the modules that stay as they are;
`texts`, what the model reads; `tokens`, how many of one text it reads. Standard output has a line
`quantised NAME` for each layer that is ready.
"""

import json
import re
import sys
from pathlib import Path

QUANTISING = re.compile(r"Quantizing \d+ module\(s\): \[(.*)\]")  # what its log says of a batch of layers


def samples(tokenizer, texts, tokens):
    """A row per text that has tokens, cut."""
    from datasets import Dataset

    rows = [tokenizer(text, truncation=True, max_length=tokens)["input_ids"] for text in texts]
    rows = [row for row in rows if row]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


def report(message) -> None:
    if found := QUANTISING.search(message.record["message"]):
        for name in found[1].split(","):
            print("quantised", name.strip(" '"), flush=True)


def main(job) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from loguru import logger
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.add(report, level="INFO")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    network = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    rows = samples(tokenizer, job["texts"], job["tokens"])
    group = {"targets": ["Linear"], "weights": job["weights"], "input_activations": job["activations"]}
    oneshot(
        model=network,
        tokenizer=tokenizer,
        dataset=rows,
        recipe=GPTQModifier(config_groups={"group_0": group}, ignore=job["ignore"]),
        num_calibration_samples=len(rows),
        max_seq_length=job["tokens"],
        shuffle_calibration_samples=False,
    )
    network.save_pretrained(job["out"], save_compressed=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

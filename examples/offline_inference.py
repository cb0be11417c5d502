"""Offline batch inference: vLLM, compiled by gcu-compile. Nothing here names the backend; the plugin is found.

    python examples/offline_inference.py [MODEL_FOLDER]
"""

import sys

from vllm import LLM, SamplingParams

from gcu_compile.demo_model import ensure_demo_model

QUESTIONS = ["What is the capital of France?", "Name three primary colours.", "Why is the sky blue?"]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(ensure_demo_model())
    llm = LLM(model, max_model_len=2048, kv_cache_memory_bytes=1 << 30)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    for question, output in zip(QUESTIONS, llm.chat(chats, SamplingParams(temperature=0, max_tokens=60)), strict=True):
        print(f"\n{question}\n  {output.outputs[0].text.strip()}")


if __name__ == "__main__":  # workers are spawned and import this file
    main()

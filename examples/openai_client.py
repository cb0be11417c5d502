"""Asks a running `vllm serve MODEL` a question and streams the answer.

    vllm serve MODEL --port 8000
    python examples/openai_client.py [http://localhost:8000/v1] ["your question"]
"""

import sys

from openai import OpenAI


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
    question = sys.argv[2] if len(sys.argv) > 2 else "What is the capital of France?"
    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=60, stream=True
    )
    for part in stream:
        print(part.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()

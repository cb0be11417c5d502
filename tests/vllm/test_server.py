"""`vllm serve` on this platform: concurrent streams, the example's client, and how the server ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from openai import APIStatusError, OpenAI
from tiny import save_llama, save_tokenizer

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parent.parent.parent
CLIENTS, REQUESTS, TOKENS = 32, 64, 12


class Server:
    """A `vllm serve` process and its address."""

    def __init__(self, model: Path, folder: Path, *more: str):
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self.log = folder / "server.log"
        env = {**os.environ, "VLLM_CACHE_ROOT": str(folder / "vllm"), "VLLM_CPU_KVCACHE_SPACE": "1"}
        words = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--port", str(port)]
        words += ["--host", "127.0.0.1", "--max-model-len", "128", "--max-num-seqs", "32", "--dtype", "float32"]
        words += ["--enforce-eager", *more]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=env)
        self.wait()

    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url, api_key="none", max_retries=0)

    def wait(self) -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                self.client().models.list()
                return
            except Exception:  # not up yet
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> None:
        children = self.children() if self.process.poll() is None else []
        for process in (self.process, *children):
            process.kill()
        self.process.wait()


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether all of them end in that time."""
    return not psutil.wait_procs(processes, timeout=seconds)[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tokenizer(save_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    server = Server(model, tmp_path_factory.mktemp("server"))
    yield server
    server.end()


def stream(client: OpenAI, number: int) -> tuple[str, str]:
    """Text and finish reason of a streamed greedy completion."""
    name = client.models.list().data[0].id
    parts = list(
        client.completions.create(
            model=name,
            prompt=f"prompt number {number}",
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
    )
    return "".join(part.choices[0].text for part in parts), parts[-1].choices[0].finish_reason


def test_example_client_answers(server):
    words = [sys.executable, str(ROOT / "examples" / "openai_client.py"), server.url, "hello"]
    run = subprocess.run(words, capture_output=True, timeout=120)
    assert run.returncode == 0 and run.stdout.strip(), run.stderr.decode()[-2000:]


def test_concurrent_streams_are_complete_and_equal_to_single_ones(server):
    client = server.client()
    alone = [stream(client, number) for number in range(8)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        together = list(pool.map(lambda number: stream(server.client(), number % 8), range(REQUESTS)))
    assert {reason for _, reason in alone + together} == {"length"}
    assert together == [alone[number % 8] for number in range(REQUESTS)]


def test_bad_request_is_an_error_and_the_server_goes_on(server):
    client = server.client()
    name = client.models.list().data[0].id
    with pytest.raises(APIStatusError) as error:
        client.completions.create(model=name, prompt="x", temperature=-1)
    assert 400 <= error.value.status_code < 500
    assert stream(client, 1)[1] == "length"


def test_sigterm_ends_cleanly(server):
    children = server.children()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0, server.log.read_text()[-3000:]
    assert gone(children, 10)


@pytest.mark.parametrize("victim", ["EngineCore", "Worker"])
def test_killed_process_ends_the_server_with_an_error(victim, model, tmp_path):
    server = Server(model, tmp_path, "--distributed-executor-backend", "uni" if victim == "EngineCore" else "mp")
    try:
        children = server.children()
        named = {child: " ".join([child.name(), *child.cmdline()]) for child in children}
        next(child for child, name in named.items() if victim in name).kill()
        assert server.process.wait(30) == 1
        assert gone(children, 10)
        assert "The engine process died; the server ends with exit status 1." in server.log.read_text()
    finally:
        server.end()


@pytest.mark.slow
def test_an_int8_cache_by_the_command_line(model, tmp_path):
    """`--kv-cache-dtype int8` reaches our backend, in one stream and in many."""
    server = Server(model, tmp_path, "--kv-cache-dtype", "int8")
    try:
        alone = [stream(server.client(), number) for number in range(4)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda number: stream(server.client(), number % 4), range(8)))
        assert {reason for _, reason in alone} == {"length"} and together == alone * 2
        assert "Attention: GcuAttentionBackend (only it reads an int8 cache)" in server.log.read_text()
    finally:
        server.end()

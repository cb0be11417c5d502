"""The worker of target `host`: vLLM's CPU worker with our samplers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.config import CompilationMode
from vllm.v1.worker.cpu_worker import CPUWorker

from gcu_compile.cache.key import cache_key
from gcu_compile.kernels.host.build import load_ahead
from gcu_compile.options import resolve
from vllm_integration import cores, linear, vllm_private
from vllm_integration.behaviours import log
from vllm_integration.compilation import keyed
from vllm_integration.frames import with_room
from vllm_integration.lazy_memory import LazyZeros
from vllm_integration.rejection_sampler import GcuRejectionSampler
from vllm_integration.reports import keep_or_recall
from vllm_integration.sampler import GcuSampler

WARM_UP_TOKENS = 512  # of a first run that only compiles


class GcuHostWorker(CPUWorker):
    """vLLM's `CPUWorker`; everything but post-processing is vLLM's own."""

    _runner: Any = None
    _replay: Any = None
    _stepping = False

    @property
    def model_runner(self) -> Any:
        """Whoever gets at the runner between steps may change what it holds: weights, adapters, caches."""
        if not self._stepping:
            self.forget_steps()
        return self._runner

    @model_runner.setter
    def model_runner(self, runner: Any) -> None:
        self._runner = runner

    def init_device(self) -> None:
        cores.bind(self.vllm_config)
        super().init_device()
        options = resolve()
        load_ahead("sample", *(("attention", "rope") if options.attention != "vllm" else ()))  # while Python traces
        if self.model_config.is_multimodal_model and options.attention != "vllm":
            from vllm_integration.attention import encode

            vllm_private.replace_encoder_attention(encode)
        linear.install()
        if options.shadow != "off":
            from gcu_compile.debug import shadow  # a start from vLLM's cache never reaches the backend

            shadow.enable(options)
        if self.use_v2_model_runner:
            log.warning("vLLM's V2 model runner keeps its own sampler: post-processing is in float32.")
            return
        runner = self.model_runner
        runner.sampler = GcuSampler(
            runner, logprobs_mode=runner.sampler.logprobs_mode, use_fp64_gumbel=runner.sampler.use_fp64_gumbel
        )
        if hasattr(runner, "rejection_sampler"):  # speculative decoding
            runner.rejection_sampler = GcuRejectionSampler(runner.sampler, runner.speculative_config, runner.device)

    def load_model(self, *args, **kwargs) -> None:
        # What option `linear` came to on this machine is part of every graph.
        key = f"{cache_key(resolve(), 'host')}-linear-{linear.are_ours()}"
        self.vllm_config.additional_config = keyed(self.vllm_config.additional_config, key)
        super().load_model(*args, **kwargs)

    def determine_available_memory(self) -> int:
        """With the cache's size given, the first run has nothing to measure: it only compiles, and a short one does."""
        runner = self.model_runner
        longest = runner.max_num_tokens
        if self.cache_config.kv_cache_memory_bytes is not None:
            runner.max_num_tokens = min(longest, WARM_UP_TOKENS)
        try:
            return super().determine_available_memory()
        finally:
            runner.max_num_tokens = longest

    def _step(self, step: Callable[..., Any], *args: Any) -> Any:
        self._stepping = True
        try:
            return step(self, *args)
        finally:
            self._stepping = False

    @with_room
    def execute_model(self, scheduler_output: Any) -> Any:
        if self._replay is not None and scheduler_output.scheduled_new_reqs:
            self._replay.check_again()
        return self._step(CPUWorker.execute_model, scheduler_output)

    @with_room
    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._step(CPUWorker.sample_tokens, grammar_output)

    def take_draft_token_ids(self) -> Any:
        return self._step(CPUWorker.take_draft_token_ids)

    def start_weight_update(self) -> None:
        self.forget_steps()
        super().start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.forget_steps()  # those that ran since the update began
        super().update_weights(update_info)

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self.forget_steps()

    def forget_steps(self) -> None:
        """Capture steps anew: the model may be another."""
        if self._replay is not None:
            self._replay.forget()

    def initialize_from_config(self, kv_cache_config) -> None:
        with LazyZeros():
            super().initialize_from_config(kv_cache_config)

    def compile_or_warm_up_model(self):
        times = super().compile_or_warm_up_model()
        keep_or_recall(self.vllm_config)
        compiled = self.vllm_config.compilation_config.mode == CompilationMode.VLLM_COMPILE
        if compiled and resolve().replay and not self.use_v2_model_runner and self._replay is None:
            from vllm_integration import replay  # which imports vLLM's attention

            if replay.can_replay(self.vllm_config):
                load_ahead("replay")
                self._replay = self.model_runner._model_forward = replay.StepReplay(self.model_runner)
        return times

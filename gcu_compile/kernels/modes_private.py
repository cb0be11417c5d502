"""Whether a mode or a transform of torch wants to see the calls of this thread."""

from __future__ import annotations

import torch
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import _profiler_enabled
from torch.nn.modules import module as modules


def watched() -> bool:
    """Whether one is there: such as `torch.device(...)` as a context, by which new tensors lie elsewhere, fake tensors,
    a counter of operations, vmap."""
    return bool(_len_torch_function_stack() or _len_torch_dispatch_stack() or peek_interpreter_stack() is not None)


def profiled() -> bool:
    """Whether a profiler of torch notes the operations of this thread."""
    return _profiler_enabled()


def hooked(model: torch.nn.Module) -> bool:
    """Whether somebody wants to see each call of one of its modules."""
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

"""Entry point `torch.backends`: PyTorch calls it at the end of its own import, so it must cost nothing unasked."""

import os


def autoload() -> None:
    """Start the emulated card that variable GCU_COMPILE_EMULATE names, if it names one."""
    if os.environ.get("GCU_COMPILE_EMULATE"):
        from gcu_compile.targets import emulator

        emulator.start()

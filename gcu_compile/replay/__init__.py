"""Capture and replay: the kernels that a step of a compiled model called, called again without Python.

    capture.py            watches one run and notes every call of a kernel or an operation, with its addresses
    memory.py             says what lies at each address, and plans where intermediate results lie
    graph.py              the captured calls, ready to be replayed
    generated_private.py  the kernels and operations that Inductor's wrappers call
    kernels/host/replay.cpp makes the calls

For the CPU what CUDA graphs are for a GPU: a step of few tokens is some three hundred kernels of a few microseconds
each, and Python between them takes as long again. What cannot be captured is refused with the reason.
"""

"""A step of a compiled model as a tape: the calls of kernels that it made, made again without Python.

    recorder.py           watches one run and notes every kernel's call, with its addresses
    plan.py               says of every address what lies there, and gives intermediate results their places
    tape.py               the calls, ready to be made again for other inputs of the same form
    generated_private.py  the kernels that Inductor wrote
    kernels/host/replay.cpp makes the calls

For the CPU what a captured graph is for a GPU: a step of few tokens is some two hundred kernels of a few microseconds
each, and Python between them takes as long again. What cannot be a tape is refused with the reason.
"""

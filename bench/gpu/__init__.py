"""Parts of gpu_suite.py: how it times, what it measures, what it concludes.

    install.py    the tree, importable without network            supervise.py  a process that may die or hang
    state.py      the JSON, rewritten whole after every figure     work.py       that process: part after part
    context.py    what a part is given                             timing.py     interleaved times, eager and as CUDA graphs
    parts.py      the parts, their order and their shares          goals.py      G1 to G11 from the JSON
    machine.py, layers.py, whole.py, step.py  the parts            report.py     the table
    clip.py       the models of step.py

Only work.py, timing.py, context.py and the parts import torch: what leads and prints cannot be taken down by a device.
"""

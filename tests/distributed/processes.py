"""Functions run in several processes that find each other as torchrun's do, over gloo, with one thread each."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback

import torch

# imported once, by the process that all others are forked from: a test then starts in milliseconds
PRELOADED = ["torch.distributed.fsdp", "open_clip", "fastlora.continual.trainer", "continual.conftest"]
SECONDS = 120


class Failed(AssertionError):
    """What the processes raised, all of them."""


def in_processes(size, work, *arguments):
    """[work(rank, *arguments) of every rank]; all started at once."""
    results = started(size, work, *arguments)()
    errors = [f"process {rank}:\n{error}" for rank, (_, error) in enumerate(results) if error]
    if errors:
        raise Failed("\n".join(errors))
    return [value for value, _ in results]


def started(size, work, *arguments):
    """A function that waits for all processes: [(result, "") or (None, error)], error "died" without a word."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    processes = []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_in_one, args=(theirs, rank, size, store.port, work, arguments), daemon=True)
        process.start()
        theirs.close()
        processes.append((process, ours))

    def wait(store=store):
        found = []
        for _, pipe in processes:
            try:
                found.append(pickle.loads(pipe.recv_bytes()) if pipe.poll(SECONDS) else (None, "hangs"))
            except EOFError:
                found.append((None, "died"))
        for process, _ in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        return found

    return wait


def _in_one(pipe, rank, size, port, work, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as conftest.py: memory that nobody wrote holds NaN
    torch.manual_seed(rank)
    try:
        answer = work(rank, *arguments), ""
    except BaseException:
        answer = None, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

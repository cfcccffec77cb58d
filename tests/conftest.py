"""One thread a test: two threads that wait for each other are slower than one wherever anything else runs."""

import multiprocessing
import signal
import socket

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it, for good
settings.register_profile("same", derandomize=True)  # the same examples for everybody
settings.load_profile("same")
CLEAN_PROCESSES = multiprocessing.get_context("forkserver")
CLEAN_PROCESSES.set_forkserver_preload(["torch", "torch._dynamo", "kdlib"])  # DDP imports the second


@pytest.fixture(scope="session")
def launch():
    """Return a function that calls ``work(environment, say, *arguments)`` in ``world`` processes.

    With the environment, which torchrun would give them, ``kdlib.ranks.group()`` makes a process group of them. What
    each one says is returned, in the order of the ranks.
    """

    def launched(work, world, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes, heard = [], []
        for rank in range(world):
            environment = {
                "RANK": f"{rank}",
                "WORLD_SIZE": f"{world}",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": f"{port}",
            }
            ear, mouth = CLEAN_PROCESSES.Pipe(duplex=False)
            processes.append(CLEAN_PROCESSES.Process(target=work, args=(environment, mouth.send, *arguments)))
            processes[-1].start()
            mouth.close()  # so that a process that dies without a word is an EOFError
            heard.append(ear)
        try:
            found = [ear.recv() for ear in heard]
            for process in processes:
                process.join(60)
        finally:
            for process in processes:
                process.kill()
        assert [process.exitcode for process in processes] == [0] * world
        return found

    return launched

"""A real OpenAI-compatible server on 127.0.0.1: llama.cpp with the embedded model, in a process of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

_SERVER = """
import sys
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.hostnames, parameters.port = ["127.0.0.1"], 0
parameters.n_ctx, parameters.n_parallel = int(sys.argv[2]), 2
parameters.kv_unified = False
parameters.cpuparams.n_threads = 2
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def llama_server(context: int = 4096) -> Iterator[str]:
    """The address, up to and with /v1, of a server with two slots that share `context` tokens.

    Skips the test where the package or the embedded model is absent.
    """
    import pytest

    from pomona.models.embedded import source

    pytest.importorskip("xllamacpp", reason="the package xllamacpp (extra dev) is not installed")
    model = source()
    if model is None:
        pytest.skip("the embedded model is not installed")
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(model), str(context)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield f"{process.stdout.readline().strip()}/v1"
    finally:
        process.stdin.close()
        process.wait(timeout=30)

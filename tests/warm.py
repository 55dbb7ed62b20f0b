"""Launch `python -m qwlit …` from a process that has imported everything, because imports take four seconds each time.

A server imports torch, Lightning, transformers and qwlit once, and forks a child for each launch. `warm_python()` is a
script that stands in for the interpreter: it hands its arguments, environment, folder and pipes to the server, passes
on the signals that it gets, and ends as the child ends. If it is killed, the server kills the child. A process that the
child starts with `sys.executable` (a rank, a trial) comes from the same server.

Other modules, and environments that imports depend on, get the real interpreter.
"""

import array
import contextlib
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path

# Lightning starts ranks as `-m qwlit.__main__`.
MODULES = (
    "qwlit",
    "qwlit.__main__",
    "tests.invariance.worker",
    "tests.runs.told_ranks",
    "tests.faults.faulty",
    "tests.faults.measured",
    "tests.faults.watched",
    "benchmarks.arms",
    "benchmarks.gpu.run_part",
    "benchmarks.gpu.train_once",
)
# torch reads TORCHELASTIC_ and TORCH_NCCL_, set by torchrun, when ranks meet; it sets TORCHINDUCTOR_CACHE_DIR itself.
READ_BY_IMPORTS = re.compile(
    r"HF_|TRANSFORMERS_|TORCH(?!ELASTIC_|_NCCL_|INDUCTOR_)|OMP_|GOMP_|KMP_|PYTHON|LD_|LC_ALL|LANG|CUDA_(?!VISIBLE)"
)
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def _read_by_imports(environment):
    found = {name: value for name, value in environment.items() if READ_BY_IMPORTS.match(name)}
    # qwlit sets it for itself, and so for the processes that it starts.
    return {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"} | found


def _read(connection, size):
    data = b""
    while len(data) < size:
        if not (part := connection.recv(size - len(data))):
            raise ConnectionError
        data += part
    return data


def stand_in(server, interpreter, known, words):
    """Be the interpreter for `words`: the body of the script that `warm_python` writes. It uses only light modules."""
    if words[:1] != ["-m"] or words[1] not in MODULES or _read_by_imports(os.environ) != known:
        os.execv(interpreter, [interpreter, *words])
    if "LOCAL_RANK" in os.environ:
        # The rank that a launcher starts asks the kernel to end with its parent; the child's parent is the server.
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server)
    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: connection.send(bytes([number])))
    ignored = [int(number) for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    launch = {
        "words": words[1:],
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "parent": os.getppid(),
        "me": os.getpid(),
    }
    launch |= {"group": os.getpgrp(), "ignored": ignored}
    body = json.dumps(launch).encode()
    pipes = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    connection.sendmsg([len(body).to_bytes(4, "big")], pipes)
    connection.sendall(body)
    code = int.from_bytes(_read(connection, 4), "big", signed=True)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def warm_python(folder, environment):
    """Start a server and return the script that launches from it.

    Args:
        folder: an empty folder for the script and the socket.
        environment: what the server imports in.
    """
    import atexit
    import subprocess

    server, script = folder / "socket", folder / "python"
    root = str(Path(__file__).parents[1])
    script.write_text(
        f"#!{sys.executable} -SE\n"
        f"import sys; sys.path.append({root!r})\n"
        "from tests.warm import stand_in\n"
        f"stand_in({str(server)!r}, {sys.executable!r}, {_read_by_imports(environment)!r}, sys.argv[1:])\n"
    )
    script.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(server))
    listener.listen(64)
    words = [sys.executable, "-m", "tests.warm", str(listener.fileno()), str(script), str(os.getpid())]
    environment = _read_by_imports(environment) | environment
    process = subprocess.Popen(words, cwd=root, env=environment, pass_fds=[listener.fileno()])
    listener.close()
    atexit.register(process.kill)
    return str(script)


def serve(listener, script):
    """Fork a child for each connection; report its end, pass signals on, and kill it when the connection is lost."""
    import select

    # A file descriptor of the child (readable when it has ended) → its process id and its connection.
    children = {}
    while True:
        connections = {connection: pid for pid, connection in children.values() if connection}
        readable, _, _ = select.select([listener, *children, *connections], [], [])
        for ready in readable:
            if ready is listener:
                connection, _ = listener.accept()
                with contextlib.suppress(ConnectionError):
                    pid = _fork(connection, listener, script)
                    children[os.pidfd_open(pid)] = pid, connection
            elif ready in connections and not _pass_on(ready, connections[ready]):
                lost = next(number for number, (_, connection) in children.items() if connection is ready)
                children[lost] = connections[ready], None
                ready.close()
        # After the signals: a connection that is closed here may be among the readable ones.
        for ended in readable:
            if ended in children:
                _report(*children.pop(ended))
                os.close(ended)


def _report(pid, connection):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if connection:
        with contextlib.suppress(OSError):
            connection.sendall(code.to_bytes(4, "big", signed=True))
        connection.close()


def _pass_on(connection, pid):
    """Send the child the signals that the stand-in got; return whether the stand-in is alive, else kill the child."""
    try:
        numbers = connection.recv(16)
    except OSError:
        numbers = b""
    for number in numbers or [signal.SIGKILL]:
        # The child is not waited for yet, so its number is still its own.
        os.kill(pid, number)
    return bool(numbers)


def _fork(connection, listener, script):
    head, pipes, _, _ = socket.recv_fds(connection, 4, 3)
    if len(head) < 4:
        raise ConnectionError
    launch = json.loads(_read(connection, int.from_bytes(head, "big")))
    if pid := os.fork():
        Path(script).with_name(str(launch["me"])).write_text(str(pid))
        for pipe in pipes:
            os.close(pipe)
        return pid
    listener.close()
    connection.close()
    return _become(launch, pipes, script)


def _become(launch, pipes, script):
    """In the child: be what the real interpreter would be, and end."""
    import atexit
    import random
    import runpy
    import traceback

    import numpy
    import torch

    for number, pipe in enumerate(pipes):
        os.dup2(pipe, number)
        os.close(pipe)
    with contextlib.suppress(OSError):
        os.setpgid(0, launch["group"])
    os.chdir(launch["folder"])
    os.environ.clear()
    os.environ.update(launch["environment"])
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in launch["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    random.seed()
    numpy.random.seed()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.executable = script
    me, getppid = os.getpid(), os.getppid
    # Children of this process have their real parent.
    os.getppid = lambda: launch["parent"] if os.getpid() == me else getppid()
    module, *arguments = launch["words"]
    sys.argv = [module, *arguments]
    sys.path[0] = launch["folder"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # To take down everything that was imported would copy the server's memory, a second of work.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _preload():
    import importlib
    import pkgutil

    from qwlit.core.quiet import quieten_bitsandbytes

    quieten_bitsandbytes()
    import bitsandbytes  # noqa: F401
    import optuna  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.qwen2.modeling_qwen2
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import qwlit

    for module in pkgutil.walk_packages(qwlit.__path__, "qwlit."):
        # pyarrow, which the second one imports, starts a thread.
        if not module.name.endswith((".__main__", ".table_worker")):
            importlib.import_module(module.name)
    importlib.import_module("tests.invariance.worker")


if __name__ == "__main__":
    import gc

    from qwlit.core.ranks import die_with_parent

    die_with_parent(int(sys.argv[3]))
    _preload()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread would not survive the fork"
    # Else the garbage collector of a child would touch, and so copy, all memory.
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])

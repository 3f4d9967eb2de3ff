"""CUDA through pycuda, and CUDA graphs, which pycuda lacks, through the driver's own library."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

from edgekd._optional import require
from edgekd.engines import hardware
from edgekd.engines.base import WrongMachineError
from edgekd.errors import BuildError

_LIBRARY = "libcuda.so.1"
_CAPTURE_THIS_THREAD = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile


def driver() -> Any:
    """pycuda.driver, initialized.

    Raises:
        MissingDependency: pycuda is not installed.
        WrongMachineError: There is no NVIDIA GPU here.
    """
    if not hardware.has_nvidia_driver():  # before the import, which needs the driver's library
        raise WrongMachineError("no NVIDIA GPU here", hint="run this on the machine that has the GPU")
    cuda = require("pycuda.driver")
    try:
        cuda.init()
        count = cuda.Device.count()
    except cuda.Error as error:
        raise WrongMachineError(f"CUDA does not start here: {error}", hint="check the NVIDIA driver with nvidia-smi") from error
    if not count:
        raise WrongMachineError("CUDA finds no NVIDIA GPU here", hint="check CUDA_VISIBLE_DEVICES")
    return cuda


@contextlib.contextmanager
def context(cuda: Any) -> Iterator[Any]:
    """Make the first GPU's primary context current: the one that TensorRT, which uses the runtime library, works in."""
    current = cuda.Device(0).retain_primary_context()
    current.push()
    try:
        yield current
    finally:
        current.pop()


@contextlib.contextmanager
def translated(cuda: Any, doing: str) -> Iterator[None]:
    """Turn pycuda's errors into BuildError."""
    try:
        yield
    except cuda.MemoryError as error:
        raise BuildError(
            f"the GPU's memory does not suffice for {doing}: {error}", hint="use a smaller batch, or free memory of the GPU"
        ) from error
    except cuda.Error as error:
        raise BuildError(f"CUDA failed in {doing}: {error}", hint="see the messages of the kernel (dmesg)") from error


class CudaGraph:
    """Work on a stream, recorded once and then launched as a whole: one call instead of one per kernel.

    Args:
        stream: Handle of the stream.
        enqueue: Puts the work on the stream, and says whether it could.

    Raises:
        BuildError: The work cannot be recorded.
    """

    def __init__(self, stream: int, enqueue: Callable[[], bool]) -> None:
        self._cuda, self._stream = ctypes.CDLL(_LIBRARY), ctypes.c_void_p(stream)
        graph = ctypes.c_void_p()
        self._executable = ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(_CAPTURE_THIS_THREAD))
        try:
            done = enqueue()
        finally:
            # A failed recording must end as well: the stream could not be used again.
            code = self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph))
        if not done or code:
            reason = self._name(code) if code else "its work could not be put on the stream"
            raise BuildError(f"this engine cannot be recorded as a CUDA graph: {reason}", hint="set cuda_graph: false")
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._cuda.cuGraphDestroy(graph)

    def launch(self) -> None:
        """Put the recorded work on the stream."""
        self._call("cuGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """Free it."""
        self._call("cuGraphExecDestroy", self._executable)

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._cuda, function)(*arguments)
        if code:
            raise BuildError(f"{function} failed: {self._name(code)}", hint="set cuda_graph: false")

    def _name(self, code: int) -> str:
        name = ctypes.c_char_p()
        self._cuda.cuGetErrorName(ctypes.c_int(code), ctypes.byref(name))
        return name.value.decode() if name.value else f"CUDA error {code}"

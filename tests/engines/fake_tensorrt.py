"""A recorded fake of tensorrt and of pycuda.driver: the part of their interfaces that edgekd calls, without a GPU.

Names, arguments, defaults and kinds of results are those in the docstrings of the published Python bindings
tensorrt-cu12-bindings 10.3.0 and tensorrt-cu13-bindings 11.4.0, and in pycuda 2026.1 (its wrapper's source and manual), read in
November 2026. ``test_the_fake_has_the_signatures_of_the_library`` holds them against tensorrt_rtx, which has the same interface.
What differs between 10.3 and 11 is taken from the bindings' enumerations and NVIDIA's migration guide: STRONGLY_TYPED is bit 1
in 10.3 and bit 0 in 11; 11 has neither EXPLICIT_BATCH nor flags for precisions; the inspector's tensors have Format/Datatype in
10.x, and Format and DataType in 11. The inspector's JSON follows layers published with NVIDIA's engine explorer.

It refuses what the libraries do not have: an unknown attribute or argument fails as it would there, and so does a wrong type. It
keeps their order: work on a stream happens when the stream is synchronized and not before; an execution needs the address of
every tensor; memory must not have been freed; everything needs a current context. It computes with onnx's reference evaluator.
"""
# ruff: noqa: A001, C901  # the libraries' own names, and their classes inside functions: each fake has a state of its own

import enum
import functools
import inspect
import io
import itertools
import json
import types

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

MAGIC = b"ftrt"


def checked(function):
    """Refuse arguments of another type than annotated, as the bindings do."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kind = signature.parameters[name].annotation
            if kind is not inspect.Parameter.empty and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
                raise TypeError(f"{function.__qualname__}: {name} must be {kind}; received {value!r}")
        return function(*args, **kwargs)

    return call


class Strict:
    """Takes no attribute that its class does not declare in ``_settable``, except from its own methods (with an underscore)."""

    _settable = ()

    def __setattr__(self, name, value):
        if not name.startswith("_") and name not in self._settable:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r} that can be set")
        object.__setattr__(self, name, value)


class Cuda:
    """What the fake GPU holds: streams, memory and contexts; ``driver`` is the module."""

    def __init__(self, name="NVIDIA Orin", capability=(8, 7), integrated=1, free=4 << 30):
        gpu = self
        self.contexts, self.memory, self.streams, self.clock_ms = [], {}, {}, itertools.count(1)
        self.addresses = itertools.count(0x1000, 0x100000)
        self.launched_graphs = 0

        class Error(Exception):
            pass

        class LogicError(Error):
            pass

        class MemoryError(Error):
            pass

        def current():
            if not gpu.contexts:
                raise LogicError("invalid device context")

        class Context(Strict):
            def push(self):
                gpu.contexts.append(self)

            @staticmethod
            def pop():
                gpu.contexts.pop()

        class Device(Strict):
            @checked
            def __init__(self, number: int):
                self._number = number

            @staticmethod
            def count():
                return 1

            def name(self):
                return name

            def compute_capability(self):
                return capability

            def get_attribute(self, attr):
                return {device_attribute.INTEGRATED: integrated}[attr]

            def retain_primary_context(self):
                return Context()

        class device_attribute(enum.Enum):  # noqa: N801  # pycuda's name
            INTEGRATED = 18

        class DeviceAllocation(Strict):
            def __init__(self, size):
                self._address, self._bytes = next(gpu.addresses), bytearray(size)
                gpu.memory[self._address] = self._bytes

            def __int__(self):
                return self._address

            def free(self):
                current()
                del gpu.memory[self._address]

        class Stream(Strict):
            @checked
            def __init__(self, flags: int = 0):
                current()
                self._handle, self._work, self._recording = 7000 + len(gpu.streams), [], None
                gpu.streams[self._handle] = self

            @property
            def handle(self):
                return self._handle

            def _put(self, work, *, may_be_recorded=False):
                current()
                if self._recording is not None:
                    assert may_be_recorded, "only the execution belongs into the graph"
                    self._recording.append(work)
                else:
                    self._work.append(work)

            def synchronize(self):
                current()
                assert self._recording is None, "a stream that is being recorded cannot be waited for"
                while self._work:
                    self._work.pop(0)()

        class Event(Strict):
            @checked
            def __init__(self, flags: int = 0):
                current()
                self._ms = None

            def record(self, stream=None):
                self._ms = None
                stream._put(lambda: setattr(self, "_ms", next(gpu.clock_ms)))
                return self

            def time_till(self, event):
                if self._ms is None or event._ms is None:
                    raise LogicError("invalid value: the event has not been reached")
                return float(event._ms - self._ms)

        def pagelocked_empty(shape, dtype, order="C", mem_flags=0):
            current()
            return np.full(shape, 77, dtype, order)

        def mem_alloc(size):
            current()
            if size > free:
                raise MemoryError("cuMemAlloc failed: out of memory")
            return DeviceAllocation(size)

        def memcpy_htod_async(dest, src, stream=None):
            stream._put(lambda: gpu.memory[int(dest)].__setitem__(slice(None), src.tobytes()))

        def memcpy_dtoh_async(dest, src, stream=None):
            stream._put(lambda: np.copyto(dest, np.frombuffer(gpu.memory[int(src)], dest.dtype).reshape(dest.shape)))

        def mem_get_info():
            current()
            return free, 2 * free

        self.driver = types.ModuleType("pycuda.driver")
        for item in (
            *(Error, LogicError, MemoryError, Device, device_attribute, Stream, Event),
            *(pagelocked_empty, mem_alloc, memcpy_htod_async, memcpy_dtoh_async, mem_get_info),
        ):
            setattr(self.driver, item.__name__, item)
        self.driver.init = lambda flags=0: None

    def loader(self, name):
        """libcuda's functions for graphs, called through ctypes; results are CUDA's codes."""
        gpu, graphs, executables = self, {}, {}

        class LibCuda:
            def cuStreamBeginCapture_v2(self, stream, mode):  # noqa: N802
                gpu.streams[stream.value]._recording = []
                return 0

            def cuStreamEndCapture(self, stream, graph):  # noqa: N802
                recorded = gpu.streams[stream.value]._recording
                gpu.streams[stream.value]._recording = None
                graph._obj.value = len(graphs) + 1
                graphs[graph._obj.value] = recorded
                return 0

            def cuGraphInstantiateWithFlags(self, executable, graph, flags):  # noqa: N802
                executable._obj.value = len(executables) + 1
                executables[executable._obj.value] = graphs[graph.value]
                return 0

            def cuGraphDestroy(self, graph):  # noqa: N802
                del graphs[graph.value]
                return 0

            def cuGraphLaunch(self, executable, stream):  # noqa: N802
                gpu.launched_graphs += 1
                for work in executables[executable.value]:
                    gpu.streams[stream.value]._put(work)
                return 0

            def cuGraphExecDestroy(self, executable):  # noqa: N802
                del executables[executable.value]
                return 0

            def cuGetErrorName(self, code, name):  # noqa: N802
                name._obj.value = b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
                return 0

        assert name == "libcuda.so.1"
        return LibCuda()


def make(version, cuda):
    """The module tensorrt of this version on this GPU; ``module.seen`` notes the settings of the last build."""
    eleven = int(version.split(".")[0]) >= 11
    trt = types.ModuleType("tensorrt")
    trt.__version__ = version
    trt.seen = seen = {}

    def enumeration(name, *members, start=0):
        setattr(trt, name, enum.IntEnum(name, list(members), start=start))

    flags = ("STRONGLY_TYPED", "PREFER_JIT_PYTHON_PLUGINS") if eleven else ("EXPLICIT_BATCH", "STRONGLY_TYPED")
    enumeration("NetworkDefinitionCreationFlag", *flags)
    enumeration("MemoryPoolType", "WORKSPACE", "TACTIC_DRAM")
    enumeration("ProfilingVerbosity", "LAYER_NAMES_ONLY", "NONE", "DETAILED")
    enumeration("LayerInformationFormat", "ONELINE", "JSON")
    enumeration("TensorIOMode", "NONE", "INPUT", "OUTPUT")
    enumeration("DataType", "FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8")
    enumeration("BuilderFlag", *(() if eleven else ("FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS")), "DEBUG", "TF32")
    enumeration("ErrorCode", "SUCCESS", "MODEL_DESERIALIZE_FAILED", "UNSUPPORTED_NODE", "INVALID_NODE")
    dtypes = {"float32": trt.DataType.FLOAT, "float16": trt.DataType.HALF, "int8": trt.DataType.INT8}
    # The real enumerations are bound types: an int is not one of them.

    class ILogger:
        Severity = enum.IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0)

        def __init__(self):
            self._ready = True  # the bindings fail where a subclass forgets to call this

    class IProfiler:
        def __init__(self):
            self._ready = True

    def say(logger, severity, text):
        assert logger._ready
        logger.log(getattr(ILogger.Severity, severity), text)

    class IHostMemory(bytes):
        pass

    class ITensor(Strict):
        def __init__(self, value):
            tensor = value.type.tensor_type
            self._name = value.name
            self._dtype = dtypes[np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name]
            self._shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)

        name = property(lambda self: self._name)
        dtype = property(lambda self: self._dtype)
        shape = property(lambda self: self._shape)

    class ILayer(Strict):
        def __init__(self, name):
            self._name = name

        name = property(lambda self: self._name)
        num_inputs = property(lambda self: 0)
        num_outputs = property(lambda self: 0)

    class INetworkDefinition(Strict):
        def __init__(self, flags):
            self._strong, self._model = eleven or bool(flags & 2), None

        num_inputs = property(lambda self: len(self._model.graph.input))
        num_outputs = property(lambda self: len(self._model.graph.output))
        num_layers = property(lambda self: len(self._model.graph.node))

        @checked
        def get_input(self, index: int):
            return ITensor(self._model.graph.input[index])

        @checked
        def get_layer(self, index: int):
            return ILayer(self._model.graph.node[index].name)

    class IOptimizationProfile(Strict):
        def __init__(self):
            self._shapes = {}

        @checked
        def set_shape(self, input: str, min: tuple, opt: tuple, max: tuple):
            self._shapes[input] = [min, opt, max]

    class ITimingCache(Strict):
        def __init__(self, data):
            self._data = data

        def serialize(self):
            return IHostMemory(self._data)

    class IBuilderConfig(Strict):
        _settable = ("profiling_verbosity",)

        def __init__(self):
            self._limits, self._profiles, self._cache = {}, [], None
            self._flags = {trt.BuilderFlag.TF32}
            self.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY

        @checked
        def set_memory_pool_limit(self, pool: trt.MemoryPoolType, pool_size: int):
            self._limits[pool.name] = pool_size

        @checked
        def set_flag(self, flag: trt.BuilderFlag):
            self._flags.add(flag)

        @checked
        def clear_flag(self, flag: trt.BuilderFlag):
            self._flags.discard(flag)

        @checked
        def add_optimization_profile(self, profile: IOptimizationProfile):
            self._profiles.append(profile)
            return len(self._profiles) - 1

        @checked
        def create_timing_cache(self, serialized_timing_cache: bytes):
            return None if serialized_timing_cache == b"garbage" else ITimingCache(serialized_timing_cache)

        @checked
        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool):
            fits = cache._data in (b"",) or cache._data.startswith(cuda.driver.Device(0).name().encode())
            if fits or ignore_mismatch:
                self._cache = cache
            return fits or ignore_mismatch

        def get_timing_cache(self):
            return self._cache

    class Builder(Strict):
        @checked
        def __init__(self, logger: ILogger):
            if not cuda.contexts:
                raise RuntimeError("no CUDA context")
            self._logger = logger

        @checked
        def create_network(self, flags: int = 0):
            return INetworkDefinition(flags)

        def create_builder_config(self):
            return IBuilderConfig()

        def create_optimization_profile(self):
            return IOptimizationProfile()

        @checked
        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig):
            if not network._strong:
                say(self._logger, "ERROR", "the network is weakly typed")
                return None
            free = any(-1 in network.get_input(index).shape for index in range(network.num_inputs))
            if free and not config._profiles:
                text = "Network has dynamic or shape inputs, but no optimization profile has been defined."
                say(self._logger, "ERROR", f"IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error ({text})")
                return None
            for node in network._model.graph.node:
                if node.op_type == "LRN":
                    reason = f"Could not find any implementation for node {node.name}."
                    place = "In computeCosts at /_src/optimizer/common/tactic/optimizer.cpp:4103"
                    say(
                        self._logger,
                        "ERROR",
                        f"IBuilder::buildSerializedNetwork: Error Code 10: Internal Error ({reason} {place})",
                    )
                    return None
            if config._cache is not None and not config._cache._data:
                config._cache = ITimingCache(cuda.driver.Device(0).name().encode() + b" tactics")
            seen.update(limits=config._limits, flags={flag.name for flag in config._flags}, verbosity=config.profiling_verbosity)
            seen.update(profile=config._profiles[0]._shapes if free else {})
            data = {"version": version, "profile": config._profiles[0]._shapes if free else {}}
            data["detailed"] = config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
            head, body = json.dumps(data).encode(), network._model.SerializeToString()
            return IHostMemory(MAGIC + len(head).to_bytes(4, "little") + len(body).to_bytes(4, "little") + head + body)

    class ParserError(Strict):
        def __init__(self, code, node, operator, desc):
            self._facts = (code, node, operator, desc)

        code = lambda self: self._facts[0]  # noqa: E731
        node_name = lambda self: self._facts[1]  # noqa: E731
        node_operator = lambda self: self._facts[2]  # noqa: E731
        desc = lambda self: self._facts[3]  # noqa: E731

    class OnnxParser(Strict):
        @checked
        def __init__(self, network: INetworkDefinition, logger: ILogger):
            self._network, self._logger, self._errors = network, logger, []

        num_errors = property(lambda self: len(self._errors))

        @checked
        def get_error(self, index: int):
            return self._errors[index]

        @checked
        def parse_from_file(self, model: str):
            try:
                self._network._model = onnx.load(model)
                onnx.checker.check_model(self._network._model)
            except Exception:  # whatever protobuf makes of garbage
                text = "Failed to parse the ONNX model."
                self._errors.append(ParserError(trt.ErrorCode.MODEL_DESERIALIZE_FAILED, "", "", text))
            else:
                zeros = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in self._network._model.graph.initializer}
                for node in self._network._model.graph.node:
                    if node.op_type == "MaxUnpool":
                        self._errors.append(ParserError(trt.ErrorCode.UNSUPPORTED_NODE, node.name, node.op_type, "false"))
                    if node.op_type == "QuantizeLinear" and np.any(zeros[node.input[2]]):
                        text = "the zero point must be 0"
                        self._errors.append(ParserError(trt.ErrorCode.INVALID_NODE, node.name, node.op_type, text))
            return not self._errors

    class Runtime(Strict):
        @checked
        def __init__(self, logger: ILogger):
            self._logger = logger

        @checked
        def deserialize_cuda_engine(self, serialized_engine: bytes):
            if not cuda.contexts:
                raise RuntimeError("no CUDA context")
            head, body = (int.from_bytes(serialized_engine[at : at + 4], "little") for at in (4, 8))
            if serialized_engine[:4] != MAGIC or len(serialized_engine) != 12 + head + body:
                text = "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed."
                say(self._logger, "ERROR", f"IRuntime::deserializeCudaEngine: Error Code 1: Serialization ({text})")
                return None
            return ICudaEngine(json.loads(serialized_engine[12 : 12 + head]), serialized_engine[12 + head :], self._logger)

    class ICudaEngine(Strict):
        def __init__(self, facts, body, logger):
            self._facts, self._model, self._logger = facts, onnx.load(io.BytesIO(body)), logger
            graph = self._model.graph
            self._tensors = {value.name: ITensor(value) for value in (*graph.input, *graph.output)}
            self._inputs = {value.name for value in graph.input}

        num_io_tensors = property(lambda self: len(self._tensors))

        @checked
        def get_tensor_name(self, index: int):
            return list(self._tensors)[index]

        @checked
        def get_tensor_dtype(self, name: str):
            return self._tensors[name].dtype

        @checked
        def get_tensor_shape(self, name: str):
            return self._tensors[name].shape

        @checked
        def get_tensor_mode(self, name: str):
            return trt.TensorIOMode.INPUT if name in self._inputs else trt.TensorIOMode.OUTPUT

        @checked
        def get_tensor_profile_shape(self, name: str, profile_index: int):
            assert profile_index == 0
            return [tuple(shape) for shape in self._facts["profile"].get(name, [self._tensors[name].shape] * 3)]

        def create_execution_context(self, strategy=0):
            return IExecutionContext(self)

        def create_engine_inspector(self):
            return EngineInspector(self)

    class IExecutionContext(Strict):
        _settable = ("profiler",)

        def __init__(self, engine):
            self._engine, self._shapes, self._addresses = engine, {}, {}
            self.profiler = None

        @checked
        def set_input_shape(self, name: str, shape: tuple):
            low, _usual, high = self._engine.get_tensor_profile_shape(name, 0)
            fits = all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
            if fits:
                self._shapes[name] = shape
            else:
                say(self._engine._logger, "ERROR", f"IExecutionContext::setInputShape: Error Code 3: {name} is out of bounds")
            return fits

        @checked
        def get_tensor_shape(self, name: str):
            batch = next(iter(self._shapes.values()))[0]
            return tuple(batch if size == -1 else size for size in self._engine.get_tensor_shape(name))

        @checked
        def set_tensor_address(self, name: str, memory: int):
            self._addresses[name] = memory
            return True

        @checked
        def execute_async_v3(self, stream_handle: int):
            if set(self._addresses) != set(self._engine._tensors) or set(self._shapes) != self._engine._inputs:
                say(self._engine._logger, "ERROR", "IExecutionContext::enqueueV3: Error Code 3: an address or a shape is not set")
                return False
            cuda.streams[stream_handle]._put(self._work, may_be_recorded=True)
            return True

        def _work(self):
            def view(name):
                dtype = next(numpy for numpy, ours in dtypes.items() if ours == self._engine.get_tensor_dtype(name))
                return np.frombuffer(cuda.memory[self._addresses[name]], dtype).reshape(self.get_tensor_shape(name))

            feeds = {name: view(name).copy() for name in self._engine._inputs}
            results = ReferenceEvaluator(self._engine._model).run(None, feeds)
            for value, result in zip(self._engine._model.graph.output, results, strict=True):
                view(value.name)[...] = result
            if self.profiler is not None:
                assert self.profiler._ready
                for layer in layers(self._engine, eleven):
                    self.profiler.report_layer_time(layer["Name"], 0.001 * (2 if "conv" in layer["Name"] else 1))

    class EngineInspector(Strict):
        def __init__(self, engine):
            self._engine = engine

        @checked
        def get_engine_information(self, format: trt.LayerInformationFormat):
            rows = layers(self._engine, eleven)
            if not self._engine._facts["detailed"]:
                rows = [row["Name"] for row in rows]
            names = {"I/O Tensors": []} if eleven else {"Bindings": list(self._engine._tensors)}
            return json.dumps({"Layers": rows, **names})

    for item in (
        *(ILogger, IProfiler, IHostMemory, ITensor, ILayer, INetworkDefinition, IOptimizationProfile, ITimingCache, Builder),
        *(IBuilderConfig, ParserError, OnnxParser, Runtime, ICudaEngine, IExecutionContext, EngineInspector),
    ):
        setattr(trt, item.__name__, item)
    return trt


def layers(engine, eleven):
    """The inspector's rows: a Conv with the ReLU behind it is one layer, as are a Gemm and a reformat of its input."""
    graph = engine._model.graph
    makers = {name: node for node in graph.node for name in node.output}
    rows = []
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        integer = all(makers.get(name, node).op_type == "DequantizeLinear" for name in node.input[:2])
        users = [user for user in graph.node if node.output[0] in user.input and user.op_type == "Relu"]
        names = [node.name, *(user.name for user in users)]
        form = (
            ("Int8", "Thirty-two wide channel vectorized row major Int8 format")
            if integer
            else ("Float", "Row major linear FP32")
        )
        source = {"Name": node.input[0], "Location": "Device", "Dimensions": [1, 8, 8, 8]}
        source.update({"Format": form[1], "DataType": form[0]} if eleven else {"Format/Datatype": form[1]})
        copy = f"Reformatting CopyNode for Input Tensor 0 to {' + '.join(names)}"
        rows.append({"Name": copy, "LayerType": "Reformat", "Inputs": [source], "Outputs": [], "Metadata": ""})
        row = {"Name": " + ".join(names), "LayerType": "CaskConvolution", "Inputs": [source], "Outputs": [], "StreamId": 0}
        row["Metadata"] = "\x1e".join(f"[ONNX Layer: {name}]" for name in names)
        if node.op_type == "Conv":
            row["Weights"] = {"Type": form[0], "Count": 216}
        rows.append(row)
    return rows

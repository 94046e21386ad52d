"""Compiles traced programs with libtpu for a slice that is not there, in a process of its own, without torch.

``python -m rae_xla.xla.tpu_compiler JOB ...``: reads ``job.json``, ``traced.json`` and ``program.pb`` of each folder
and writes ``compiled.json`` and, if the program fits, ``compiled.hlo``.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

# Another process may have libtpu open; nothing is to be asked about the machine's own TPU, or for one.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# libtpu 0.0.21 aborts where these are set.
NOT_IN_ENVIRONMENT = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")


def compile_program(directory: Path) -> dict[str, Any]:
    """What the compiler says: seconds, bytes a chip, where the devices are, or that the program is too large."""
    import numpy as np
    from jax._src import compiler
    from jax._src.lib import xla_client
    from jax.experimental import topologies
    from jaxlib import _jax

    job, traced = [json.loads((directory / name).read_text()) for name in ("job.json", "traced.json")]
    topology = topologies.get_topology_desc(topology_name=job["topology"], platform="tpu", **job["topology_options"])
    # They come host by host; a program's partitions are the devices as they are counted.
    devices: Any = sorted(topology.devices, key=lambda device: device.id)
    assert len(devices) == math.prod(job["grid"]), (len(devices), job)
    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=len(devices), device_assignment=np.array([[device.id for device in devices]])
    )
    # As torch_xla does: outputs lie as they are marked, or as they come out, and are not gathered.
    options.executable_build_options.use_spmd_partitioning = True
    options.executable_build_options.allow_spmd_sharding_propagation_to_output = [True]
    if job["quick"]:
        options.executable_build_options.exec_time_optimization_effort = -1.0
    program = _with_arguments((directory / "program.pb").read_bytes(), traced["arguments"])
    found: dict[str, Any] = {
        "device_kind": devices[0].device_kind,
        "coordinates": [list(device.coords) for device in devices],
    }
    start = time.perf_counter()
    try:
        executable = devices[0].client.compile(program, xla_client.DeviceList(tuple(devices)), options)
    except _jax.XlaRuntimeError as error:
        if "memory space hbm" not in str(error):
            raise
        return {**found, "seconds": time.perf_counter() - start, "too_large": str(error)}
    found["seconds"] = time.perf_counter() - start
    stats = executable.get_compiled_memory_stats()
    kinds = {"arguments": "argument", "temporaries": "temp", "outputs": "output", "aliased": "alias"}
    found["bytes"] = {name: getattr(stats, f"{kind}_size_in_bytes") for name, kind in kinds.items()}
    found["bytes"]["code"] = stats.generated_code_size_in_bytes
    (directory / "compiled.hlo").write_text(executable.hlo_modules()[0].to_string())
    return found


def _with_arguments(hlo: bytes, arguments: list[dict[str, Any]]) -> bytes:
    """The program in StableHLO, its arguments split as they lie, and given up to the outputs that replace them."""
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jaxlib.mlir import ir

    with mlir.make_ir_context():
        module = ir.Module.parse(xla_client._xla.mlir.hlo_to_stablehlo(hlo))
        functions: Any = module.body.operations
        main = next(function for function in functions if function.attributes["sym_name"].value == "main")
        attributes = []
        for argument in arguments:
            given: dict[str, Any] = {"mhlo.sharding": ir.StringAttr.get(argument["sharding"])}
            if argument["replaced_by"] is not None:
                number = ir.IntegerType.get_signless(32)
                given["tf.aliasing_output"] = ir.IntegerAttr.get(number, argument["replaced_by"])
            attributes.append(ir.DictAttr.get(given))
        main.attributes["arg_attrs"] = ir.ArrayAttr.get(attributes)
        bytecode = io.BytesIO()
        module.operation.write_bytecode(bytecode)
        return bytecode.getvalue()


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    for variable in NOT_IN_ENVIRONMENT:
        os.environ.pop(variable, None)
    for argument in sys.argv[1:]:
        (Path(argument) / "compiled.json").write_text(json.dumps(compile_program(Path(argument))))

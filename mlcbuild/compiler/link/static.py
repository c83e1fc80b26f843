"""Static libraries for apps, which may hold several: symbols and files with a prefix of their own."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def with_prefix(module: Any, prefix: str) -> Any:
    """The module with `prefix` before the name of each function in machine code; the VM's functions keep theirs.

    TVM's AttachGlobalSymbol does this too, but fails on kernels with simdgroup instructions.
    """
    import tvm_ffi
    from tvm import IRModule, ir, relax, tirx

    machine = {gv.name_hint: f for gv, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}
    renamed = {name: ir.GlobalVar(prefix + name) for name in machine}
    for variable in renamed.values():
        relax.expr._update_type(variable, relax.FuncType.opaque_func(ret=relax.TupleType([])))
    functions: dict[Any, Any] = {
        renamed[name]: function.with_attr("global_symbol", prefix + name) for name, function in machine.items()
    }
    rename = [(ir.GlobalVar, lambda variable: renamed.get(variable.name_hint, variable))]
    for gv, function in module.functions_items():
        if isinstance(function, relax.Function):
            functions[gv] = tvm_ffi.structural_map(function, rename)
    result = IRModule(functions)
    for key, value in (module.attrs or {}).items():
        result = result.with_attr(key, value)
    return result.with_attr("system_lib_prefix", prefix)


def write_tar(objects: Sequence[Path], output: Path, prefix: str) -> None:
    """A tar of object files, the same bytes for the same objects: in order of their names, without owner or time.

    All names begin with `prefix`, so that the files of several libraries can lie in one folder.
    """
    with tarfile.open(output, "w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(objects, key=lambda each: each.name):
            content = path.read_bytes()
            member = tarfile.TarInfo(prefix + path.name.removeprefix(prefix))
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))

"""The passes that turn a decoder's graph into a module ready for code generation, in phases that can be dumped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm import IRModule, relax, transform

from mlcbuild.compiler import canonical
from mlcbuild.compiler.abi import metadata
from mlcbuild.models.kinds import ENCODER
from mlcbuild.models.structure import Structure

Pass = Callable[[IRModule], IRModule]


def _nothing(module: IRModule) -> IRModule:
    return module


@dataclass(frozen=True)
class Passes:
    """What a kind of device adds: before operators are lowered, once kernels are fused, once memory is planned."""

    model: Pass = _nothing
    kernels: Pass = _nothing
    memory: Pass = _nothing


def optimise(
    module: IRModule,
    structure: Structure,
    facts: Mapping[str, Any],
    dump: Path | None,
    passes: Passes = Passes(),
) -> IRModule:
    """Run every phase; `facts` becomes `_metadata`, and `dump` (or nothing) receives the IR after each phase."""
    module = _bound(module, structure)
    module = passes.model(module)
    _write(module, dump, "0-model")
    module = _run(
        module,
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    )
    module = passes.kernels(module)
    _write(module, dump, "1-kernels")
    module = _run(
        module,
        relax.transform.RewriteDataflowReshape(),
        relax.transform.DeadCodeElimination(),  # the kernels of reshapes, which became views
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
    )
    module = metadata.attach(module, facts)
    module = passes.memory(module)
    _write(module, dump, "2-memory")
    module = _run(
        module,
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    )
    module = canonical.order_shape_functions(module)
    _write(module, dump, "3-runtime")
    return module


def _bound(module: IRModule, structure: Structure) -> IRModule:
    """Tell memory planning how large symbolic sizes get.

    Results that go back to the caller are planned too; `seq_len` counts the tokens of a whole batch, so it is bounded
    by whichever is larger, a prefill chunk or one token of each sequence.
    """
    chunk, batch = structure.prefill_chunk_size, structure.max_batch_size
    bounds = {
        "seq_len": max(chunk, batch),
        "batch_size": batch,
        "total_seq_len": structure.context_window_size,
    }
    if structure.kind == ENCODER:
        bounds = {"seq_len": chunk, "batch_size": batch, "rows": chunk * batch}
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            module[name] = function.with_attrs(
                {
                    "tir_var_upper_bound": bounds,
                    "tir_non_negative_var": ["vocab_size"],
                    "relax.memory_plan_dynamic_func_output": True,
                }
            )
    return module


def _run(module: IRModule, *passes: Any) -> IRModule:
    return transform.Sequential(list(passes))(module)


def _write(module: IRModule, dump: Path | None, name: str) -> None:
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"{name}.py").write_text(module.script(show_meta=False))

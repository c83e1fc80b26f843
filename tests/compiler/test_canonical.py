"""The same inputs give the same bytes: what could differ between two runs of the compiler is brought to one form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlcbuild.compiler import canonical, targets
from mlcbuild.compiler.cpu.lower import lower
from tests.support import llama


@pytest.fixture(scope="module")
def module() -> Any:
    structure = llama.structure_of(llama.transformers_llama())
    return lower(structure, llama.QUANTIZATIONS["q4f16_1"], "q4f16_1", targets.resolve(llama.CPU))


def test_sizes_are_stored_in_the_order_of_their_slots(module: Any) -> None:
    from tvm import tirx

    names = [n for n, f in module.functions_items() if n.name_hint.startswith("shape_func")]
    several = next(n for n in names if isinstance(module[n].body, tirx.SeqStmt))
    ordered = list(module[several].body.seq)
    shuffled = module.clone()
    shuffled[several] = module[several].with_body(tirx.SeqStmt(ordered[::-1]))
    assert canonical.to_text(shuffled) != canonical.to_text(module)
    assert canonical.to_text(canonical.order_shape_functions(shuffled)) == canonical.to_text(module)


def test_equal_functions_of_sizes_become_one(module: Any) -> None:
    """VMShapeLower takes two for different ones where their stores are in different orders, which addresses decide."""
    import tvm_ffi
    from tvm import ir, relax, tirx

    one = next(n for n, f in module.functions_items() if isinstance(f.body, tirx.SeqStmt) and "shape_func" in str(n))
    caller = next(
        n for n, f in module.functions_items() if isinstance(f, relax.Function) and f"{one.name_hint}(" in str(f)
    )
    other = ir.GlobalVar("shape_func99")
    relax.expr._update_type(other, ir.load_json(ir.save_json(one.ty)))
    split = module.clone()
    ordered = list(module[one].body.seq)
    split[other] = module[one].with_body(tirx.SeqStmt(ordered[::-1])).with_attr("global_symbol", "shape_func99")
    replaced = [
        (ir.GlobalVar, lambda gv: other if gv.same_as(one) else gv),
        (ir.TupleType, lambda of: other.ty.ret if of.same_as(one.ty.ret) else of),
    ]
    split[caller] = tvm_ffi.structural_map(module[caller], replaced)
    assert canonical.to_text(split) != canonical.to_text(module)
    assert canonical.to_text(canonical.order_shape_functions(split)) == canonical.to_text(module)


def test_no_source_position_is_kept(module: Any) -> None:
    nodes = json.loads(canonical.to_text(module))["nodes"]
    assert not {node["type"] for node in nodes} & {"ir.Span", "ir.SourceName"}

"""An inspection as text, and as the comments of a model file."""

from __future__ import annotations

from collections.abc import Iterator

from mlcbuild.inspect.inspection import Inspection
from mlcbuild.inspect.sizes import Size
from mlcbuild.text import amount


def render(inspection: Inspection) -> str:
    """What `mlcbuild inspect` prints."""
    return "".join(f"{line}\n" for line in _lines(inspection))


def quantizations(inspection: Inspection, memory: int) -> list[str]:
    """A line for each quantization, those that fit into `memory` bytes first, the finest first among them."""
    sizes = {name: size for name, size in inspection.sizes.items() if size.problem is None}
    fitting = sorted((name for name in sizes if sizes[name].total <= memory), key=lambda n: (-sizes[n].weights, n))
    others = sorted((name for name in sizes if name not in fitting), key=lambda name: (sizes[name].weights, name))
    width = max((len(name) for name in sizes), default=0)
    lines = [f"{name:{width}}  {_size(sizes[name])}" for name in fitting]
    if others:
        smallest = f"; the smallest is {others[0]}, {amount(sizes[others[0]].total)}" if not fitting else ""
        lines.append(f"({amount(memory)} do not hold {', '.join(others)}{smallest})")
    return lines


def _lines(inspection: Inspection) -> Iterator[str]:
    checkpoint = inspection.checkpoint
    yield f"checkpoint    {checkpoint.source}" + (f", the model `{checkpoint.model.name}`" if checkpoint.model else "")
    if checkpoint.locked is not None:
        state = "not in recipes.lock" if checkpoint.fresh else "as locked"
        yield f"commit        {checkpoint.locked.commit[:12]} ({state})"
    if checkpoint.model is not None:
        for name, source in (("delta of", checkpoint.model.delta_of), ("LoRA", checkpoint.model.lora)):
            if source is not None:
                yield f"{name:14}{source}"
    yield f"files         {len(checkpoint.sizes)}, {amount(sum(checkpoint.sizes.values()))}"
    yield f"architecture  {inspection.architecture.name}"
    yield f"structure     {inspection.structure.label}"
    for name, value in inspection.choices.items():
        yield f"              {name}: {value}"
    yield f"parameters    {inspection.parameters:,}"
    yield from _of_tensors(inspection)
    yield from _of_tokens(inspection)
    yield from _of_template(inspection)
    yield "weights       in each quantization, and keys and values:"
    width = max(map(len, inspection.sizes))
    for name, size in sorted(inspection.sizes.items(), key=lambda item: (item[1].weights, item[0])):
        if size.problem is None:
            yield f"              {name:{width}}  {_size(size)}"
    yield from _of_reuse(inspection)


def _of_tensors(inspection: Inspection) -> Iterator[str]:
    tensors = inspection.tensors
    if tensors is None:
        return
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sorted(tensors.dtypes.items()))
    yield f"tensors       {tensors.count}" + (f": {dtypes}" if dtypes else "")
    for note in tensors.notes:
        yield f"              {note}"
    if tensors.problem is None:
        yield "              what the architecture needs, and nothing else"
    else:
        yield from (f"              {line}" for line in f"PROBLEM: {tensors.problem}".splitlines())


def _of_tokens(inspection: Inspection) -> Iterator[str]:
    if inspection.checkpoint.trouble is not None:
        yield f"tokenizer     not looked at: {inspection.checkpoint.trouble}"
    elif inspection.tokens is None:
        yield "tokenizer     none: a package needs tokenizer.json or tokenizer.model"
    else:
        tokens = inspection.tokens
        # A model of texts never writes any, so that how tokens become text says nothing of it.
        method = "" if inspection.embedding is not None else f"; {tokens.info['token_postproc_method']}"
        yield f"tokenizer     {tokens.count:,} tokens, {tokens.special} of them special{method}"
        yield f"              a text ends at {', '.join(tokens.ends) or 'nothing that it says'}"
        if inspection.lacks_rows:
            yield f"              PROBLEM: the model has only {inspection.structure.vocab_size:,} rows for them"


def _of_template(inspection: Inspection) -> Iterator[str]:
    guess = inspection.template
    if guess is None:
        return
    yield f"template      {guess.name}" + (": writes what the checkpoint's own writes" if guess.exact else "")
    for remark in guess.remarks:
        yield from (f"              {line}" for line in remark.splitlines())


def _of_reuse(inspection: Inspection) -> Iterator[str]:
    reuse = inspection.reuse
    if reuse.same:
        yield "libraries     these recipes build, and it would use:"
        for library, names in sorted(reuse.same.items()):
            yield f"              {library.partition(':')[2]}  {' '.join(names)}"
    else:
        yield "libraries     no recipe of this workspace builds one of this structure"
    for library, limits in sorted(reuse.close.items()):
        overrides = ", ".join(f"{key}: {value}" for key, value in limits.items())
        yield f"              {library.partition(':')[2]} with `overrides: {{{overrides}}}`"
    if reuse.unknown:
        yield f"              ({reuse.unknown} recipes are unknown until locked)"


def _size(size: Size) -> str:
    cache = f" + {amount(size.cache)} for {size.tokens:,} tokens" if size.cache else ""
    return f"{amount(size.weights)}{cache}"

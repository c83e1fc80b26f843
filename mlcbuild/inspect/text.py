"""A survey as text, and as the comments of a model file."""

from __future__ import annotations

from collections.abc import Iterator

from mlcbuild.inspect.inspect import Survey
from mlcbuild.inspect.sizes import Size
from mlcbuild.text import amount


def render(known: Survey) -> str:
    """What `mlcbuild inspect` prints."""
    return "".join(f"{line}\n" for line in _lines(known))


def quantizations(known: Survey, memory: int) -> list[str]:
    """A line for each quantization, those that fit into `memory` bytes first, the finest first among them."""
    sizes = {name: size for name, size in known.sizes.items() if size.problem is None}
    fitting = sorted((name for name in sizes if sizes[name].total <= memory), key=lambda n: (-sizes[n].weights, n))
    others = sorted((name for name in sizes if name not in fitting), key=lambda name: (sizes[name].weights, name))
    width = max((len(name) for name in sizes), default=0)
    lines = [f"{name:{width}}  {_size(sizes[name])}" for name in fitting]
    if others:
        smallest = f"; the smallest is {others[0]}, {amount(sizes[others[0]].total)}" if not fitting else ""
        lines.append(f"({amount(memory)} do not hold {', '.join(others)}{smallest})")
    return lines


def _lines(known: Survey) -> Iterator[str]:
    found = known.found
    yield f"checkpoint    {found.source}" + (f", the model `{found.model.name}`" if found.model else "")
    if found.locked is not None:
        state = "not in recipes.lock" if found.fresh else "as locked"
        yield f"commit        {found.locked.commit[:12]} ({state})"
    if found.model is not None:
        for name, source in (("delta of", found.model.delta_of), ("LoRA", found.model.lora)):
            if source is not None:
                yield f"{name:14}{source}"
    yield f"files         {len(found.sizes)}, {amount(sum(found.sizes.values()))}"
    yield f"architecture  {known.architecture.name}"
    yield f"structure     {known.structure.label}"
    for name, value in known.choices.items():
        yield f"              {name}: {value}"
    yield f"parameters    {known.parameters:,}"
    yield from _of_tensors(known)
    yield from _of_tokens(known)
    yield from _of_template(known)
    yield "weights       in each quantization, and keys and values:"
    width = max(map(len, known.sizes))
    for name, size in sorted(known.sizes.items(), key=lambda item: (item[1].weights, item[0])):
        if size.problem is None:
            yield f"              {name:{width}}  {_size(size)}"
    yield from _of_reuse(known)


def _of_tensors(known: Survey) -> Iterator[str]:
    tensors = known.tensors
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


def _of_tokens(known: Survey) -> Iterator[str]:
    if known.found.trouble is not None:
        yield f"tokenizer     not looked at: {known.found.trouble}"
    elif known.tokens is None:
        yield "tokenizer     none: a package needs tokenizer.json or tokenizer.model"
    else:
        tokens = known.tokens
        method = tokens.info["token_postproc_method"]
        yield f"tokenizer     {tokens.count:,} tokens, {tokens.special} of them special; {method}"
        yield f"              a text ends at {', '.join(tokens.ends) or 'nothing that it says'}"
        if tokens.count > known.structure.vocab_size:
            yield f"              PROBLEM: the model has only {known.structure.vocab_size:,} rows for them"


def _of_template(known: Survey) -> Iterator[str]:
    guess = known.template
    if guess is None:
        return
    yield f"template      {guess.name}" + (": writes what the checkpoint's own writes" if guess.exact else "")
    for remark in guess.remarks:
        yield from (f"              {line}" for line in remark.splitlines())


def _of_reuse(known: Survey) -> Iterator[str]:
    found = known.reuse
    if found.same:
        yield "libraries     these recipes build, and it would use:"
        for library, names in sorted(found.same.items()):
            yield f"              {library.partition(':')[2]}  {' '.join(names)}"
    else:
        yield "libraries     no recipe of this workspace builds one of this structure"
    for library, limits in sorted(found.close.items()):
        overrides = ", ".join(f"{key}: {value}" for key, value in limits.items())
        yield f"              {library.partition(':')[2]} with `overrides: {{{overrides}}}`"
    if found.unknown:
        yield f"              ({found.unknown} recipes are unknown until locked)"


def _size(size: Size) -> str:
    cache = f" + {amount(size.cache)} for {size.tokens:,} tokens" if size.cache else ""
    return f"{amount(size.weights)}{cache}"

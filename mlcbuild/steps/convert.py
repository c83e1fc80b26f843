"""convert: a checkpoint's tensors under the model's parameter names, as an index into the checkpoint's files.

Fields: structure; `untied` where the adapter makes two of what the base ties; `config` of a checkpoint on a hub as
recipes.lock has it, of which the structure was made; `base`, the repository that an adapter is laid over. Inputs:
checkpoint (config.json, weights, their index); also `base` where the checkpoint is a delta, `lora` where an adapter is
laid over it. Artifact: parameters.json, and tensors-N.bin for what no file has as it is: sums with a base or an
adapter, tensors that are not row-major or that the architecture's file says to convert, and the numbers of weights that
are quantized already.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcbuild.checkpoints import computed
from mlcbuild.checkpoints.computed import Computed
from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.index import as_stored, entry, index, with_prefix
from mlcbuild.checkpoints.locked import check_config
from mlcbuild.checkpoints.table import read_table
from mlcbuild.engine.job import Entry, Job
from mlcbuild.errors import CheckpointError
from mlcbuild.gguf import checkpoint, tensors
from mlcbuild.merging import adapter, delta, lora, low_floats, low_ints, prequantized
from mlcbuild.merging.rearranged import rearranged
from mlcbuild.models import structure
from mlcbuild.models.parameters import Parameter, ignored, parameters
from mlcbuild.models.structure import Structure
from mlcbuild.models.tied import tied_embedding
from mlcbuild.models.wrappers import unwrapped

VERSION = 2
TOOLS = ("gguf", "numpy")


def run(job: Job) -> None:
    """Raises CheckpointError when the checkpoint does not hold the parameters that its structure has."""
    model = structure.from_json(job.fields["structure"])
    files = job.inputs["checkpoint"].files
    if "config" in job.fields:
        check_config(job.fields["config"], _config(files), "the model")
    scheme = prequantized.scheme(_config(files))
    if scheme is not None and scheme.method == prequantized.GGUF:
        document = _of_gguf(job, model, files)
    elif scheme is None:
        table = _table(job, files, model)
        prequantized.check_absent(table)
        document = _indexed(job, model, table)
    else:
        table = _table(job, files, model)
        _check_plain(job, table)
        document = _dequantized(job, model, table, scheme)
    text = json.dumps(document, indent=1, sort_keys=True)
    (job.output / "parameters.json").write_text(text + "\n", encoding="utf-8")


def _table(job: Job, files: Mapping[str, Entry], model: Structure) -> dict[str, TensorRef]:
    wanted = [name for parameter in parameters(model) for name in (*parameter.sources, *parameter.alternative)]
    found = read_table(*_paths_and_digests(files), job.note)
    found = unwrapped(found) if model.wrapped else found
    return with_prefix(found, model.optional_prefix, [*wanted, *ignored(model)], job.note)


def _indexed(job: Job, model: Structure, table: Mapping[str, TensorRef]) -> dict[str, Any]:
    """The index of a checkpoint, with what has to be made; nothing is before both sides are known to be whole."""
    wanted = as_stored(parameters(model), table)
    if job.fields.get("untied"):
        table = lora.untied(wanted, table)
    document = index(wanted, table, ignored(model), job.note)
    needed = {source for parameter in wanted for source in parameter.sources}
    notes = list[str]()
    changed = computed.strided(table, needed)
    if "base" in job.inputs:
        files = job.inputs["base"].files
        scheme = prequantized.scheme(_config(files))
        if scheme is not None:
            raise CheckpointError(f"delta_of: the base is quantized by {scheme.method}: name the unquantized one")
        try:
            base = _table(job, files, model)
        except CheckpointError as error:
            raise CheckpointError("\n".join(f"delta_of: {line}" for line in str(error).splitlines())) from None
        changed = delta.merged(wanted, table, base, ignored(model))
    elif "lora" in job.inputs:
        tied = tied_embedding(wanted) if model.embedding is None else None  # a model of texts has no output matrix
        read = adapter.read(*_paths_and_digests(job.inputs["lora"].files))
        merged = lora.merged(read, table, needed, tied, notes.append)
        notes += filter(None, [adapter.other_base(read, job.fields.get("base"))])
        names = {each.target.name for each in merged}
        changed = merged + [each for each in changed if each.target.name not in names]
    for note in notes:
        job.note(note)
    if notes:
        document["notes"] = notes
    _write(job, document, wanted, table, changed)
    return document


def _write(
    job: Job,
    document: Mapping[str, Any],
    wanted: Sequence[Parameter],
    table: Mapping[str, TensorRef],
    changed: Sequence[Computed],
) -> None:
    """Make what is `changed`, and the parameters that are not the checkpoint's tensors as they are; refer to both.

    A changed tensor that is only wanted in another form is written to the scratch folder.
    """
    direct = {table[source].name for each in wanted if not each.convert for source in each.sources}
    apart = [each for each in changed if each.target.name not in direct]
    between = computed.write(computed.place(apart), job.scratch, job.progress)
    forms = rearranged(wanted, {name: between.get(ref.name, ref) for name, ref in table.items()})
    kept = [each for each in changed if each.target.name in direct]
    written = computed.write(computed.place([*kept, *forms]), job.output, job.progress)
    _point(document, written)
    for number, parameter in enumerate(wanted):
        if parameter.convert:
            document["parameters"][number] = entry(parameter, [written[parameter.name]])


def _point(document: Mapping[str, Any], written: Mapping[str, TensorRef]) -> None:
    """Let parts that were made refer to where they were written."""
    for parameter in document["parameters"]:
        for part in parameter["parts"]:
            if (ref := written.get(part["tensor"])) is not None:
                part.update(blob=ref.blob, file=ref.file, offset=ref.offset)


def _check_plain(job: Job, table: Mapping[str, TensorRef]) -> None:
    """What is quantized already can neither be summed nor laid out anew."""
    for name, key in (("base", "delta_of"), ("lora", "lora")):
        if name in job.inputs:
            raise CheckpointError(f"{key}: the checkpoint is quantized already: name the unquantized one as its source")
    for ref in table.values():
        if ref.strides is not None:
            raise CheckpointError(
                f"{ref.file}: tensor {ref.name}: not row-major, in a checkpoint that is quantized already; "
                "save it as safetensors"
            )


def _paths_and_digests(files: Mapping[str, Entry]) -> tuple[dict[str, Path], dict[str, str]]:
    return {name: entry.path for name, entry in files.items()}, {name: entry.digest for name, entry in files.items()}


def _dequantized(
    job: Job, model: Structure, table: Mapping[str, TensorRef], scheme: prequantized.Scheme
) -> dict[str, Any]:
    """The index of a checkpoint that is quantized already; nothing is written before it is known to be whole."""
    layers: dict[str, prequantized.Prequantized] = {}
    if scheme.method in prequantized.METHODS:
        table, layers = prequantized.plan(table, scheme)
        made = [prequantized.numbers(layer) for layer in layers.values()]
    else:
        table, made = (low_ints if scheme.method in prequantized.INTS else low_floats).plan(table, scheme)
    wanted = as_stored(parameters(model), table)
    document = index(wanted, table, ignored(model), job.note)
    told = scheme.told(len(made))
    job.note(told)
    document["notes"] = [told]
    _write(job, document, wanted, table, made)
    for parameter, found in zip(wanted, document["parameters"], strict=True):
        packed = None if parameter.convert else prequantized.joined(layers, parameter.sources)
        if packed is not None:
            found["packed"] = packed
    return document


def _of_gguf(job: Job, model: Structure, files: Mapping[str, Entry]) -> dict[str, Any]:
    """The index of llama.cpp's files."""
    paths, blobs = _paths_and_digests({name: each for name, each in files.items() if name.endswith(checkpoint.SUFFIX)})
    _check_plain(job, {})
    wanted = parameters(model)
    header = checkpoint.read(paths)
    table, made = tensors.read(header, paths, blobs, wanted, _config(files))
    wanted = as_stored(wanted, table)
    document = index(wanted, table, ignored(model), job.note)
    lossy = tensors.told(header)
    if lossy:
        job.note(lossy)
        document["notes"] = [lossy]
    _write(job, document, wanted, table, made)
    return document


def _config(files: Mapping[str, Entry]) -> dict[str, Any]:
    if "config.json" not in files:
        return {}
    config: dict[str, Any] = json.loads(files["config.json"].path.read_text(encoding="utf-8"))
    return config

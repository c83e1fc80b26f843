"""An architecture file applied to a `config.json`: the model's structure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.models import absorbed, complete, unknown, wrappers
from mlcbuild.models.config import normalise, scaling_problems
from mlcbuild.models.fields import by_layer, check, evaluate, keys, lookup, names_in, read, value_of
from mlcbuild.models.kinds import DECODER, ENCODER, HYBRID, RECURRENT, filled
from mlcbuild.models.rules import ParameterRule
from mlcbuild.models.structure import ATTENDING, KEEPING, Structure
from mlcbuild.recipes.types import Architecture

# A longer chunk makes prefill little faster and its buffers, which are planned for a full chunk, much larger.
_PREFILL_CHUNK_SIZE = 2048
_ROPE_THETA = 10000.0  # where neither config.json nor the architecture says another
_EMBEDS_AS = {ENCODER: "encoder"}  # embedding_metadata's model_type
_MAX_BATCH_SIZE = 128  # what mlc-ai compiles its own libraries for


def choose(
    architectures: Mapping[str, Architecture], config: Mapping[str, Any], wanted: str | None = None
) -> Architecture:
    """The architecture named `wanted`, or the one whose `match` fits config.json's `model_type`.

    That of the text model, where config.json is a wrapper's (mlcbuild.models.wrappers).

    Raises MlcBuildError when none fits, naming the nearest and what they do not know, and when several do.
    """
    if wanted is not None:
        return architectures[wanted]
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        said = "has no `model_type`" if model_type is None else f"has the model_type {model_type!r}, expected a text"
        raise MlcBuildError(f"config.json {said}: add it, or name the `architecture` in the model's YAML file")
    fitting = [each for each in architectures.values() if model_type in each.match.get("model_type", ())]
    if not fitting and wrappers.text_type(config) is not None:
        return wrappers.wrapping(choose(architectures, wrappers.alone(config)), model_type)
    if len(fitting) > 1:
        raise MlcBuildError(
            f"config.json: model_type `{model_type}` is matched by several architectures: "
            f"{', '.join(sorted(each.name for each in fitting))}; name the `architecture` in the model's YAML file"
        )
    if fitting:
        return fitting[0]
    known = sorted({name for a in architectures.values() for name in a.match.get("model_type", ())})
    raise MlcBuildError(
        f"config.json: model_type `{model_type}` is an unknown architecture{unknown.close_to(model_type, known)}; "
        f"known are: {', '.join(known)}. A new one is a YAML file in recipes/architectures/ (docs/architectures.md). "
        f"By the keys of config.json the nearest are:\n{unknown.nearest(architectures.values(), config)}"
    )


def resolve(architecture: Architecture, config: Mapping[str, Any], overrides: Mapping[str, int]) -> Structure:
    """The structure that `config` describes under `architecture`, with the recipe's `overrides` on top.

    Raises MlcBuildError for a key that is missing, of the wrong type or out of range, and for a choice that the
    decoder cannot express. All such problems are in the one error.
    """
    data = architecture.data
    flat = normalise(_text(data, config))
    kind = data.get("kind", DECODER)
    constants = {name: value for name, value in data.get("decoder", {}).items() if name != "rope_scaling"}
    if "embedding" in data:
        constants["embedding"] = {"model_type": _EMBEDS_AS.get(kind, "decoder"), **data["embedding"]}
    theta = _ROPE_THETA if flat.get("rope_theta") is None else flat["rope_theta"]
    given = {"rope_theta": theta, "rope_scaling": flat.get("rope_scaling"), **constants}
    values, problems = read(data["config"], flat, given)
    problems += by_layer(values)
    problems += check(values) + _check_requirements(data, flat) + unknown.complaints(architecture, flat)
    if problems:
        raise MlcBuildError("\n".join(problems))
    values = filled(kind, values)
    problems = _capped(data, values, overrides)
    if problems:
        raise MlcBuildError("\n".join(problems))
    values.update(_limits(kind, values["context_window_size"], overrides))
    values.update(_windows(values))
    problems = _check_shape(values) + _check_limits(kind, values)
    if problems:
        raise MlcBuildError("\n".join(problems))
    prefix = data.get("prefix", "")
    rules = tuple(_under(prefix, each) for rule in data["parameters"] for each in _rules(rule, values))
    structure = Structure(
        architecture=architecture.name,
        model_type=architecture.model_type,
        rules=rules,
        ignored=tuple(data.get("ignore", ())),
        optional_prefix=data.get("optional_prefix", ""),
        wrapped="wrapper" in data,
        **_fields(architecture, values),
    )
    problems = complete.problems(structure)
    if problems:
        raise MlcBuildError("\n".join(f"recipes/architectures/{architecture.name}.yaml: {line}" for line in problems))
    return absorbed.applied(structure)


def model_config(architecture: Architecture, structure: Structure, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `model_config` of mlc-chat-config.json: MLC's keys, in MLC's order.

    What config.json does not have either is left out.
    """
    names = {field.name: getattr(structure, field.name) for field in fields(structure)}
    flat = normalise(_text(architecture.data, config))
    found = {}
    for key, rule in architecture.data["model_config"].items():
        if not isinstance(rule, Mapping):
            found[key] = evaluate(rule, names)
        elif "default" in rule or any(lookup(flat, name) is not None for name in keys(rule)):
            found[key] = value_of(rule, flat, names)
    for key in ("position_embedding_base", "rope_theta"):
        theta = found.get(key)
        if isinstance(theta, float) and theta.is_integer():
            found[key] = int(theta)
    return found


def _text(data: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a wrapper's config that describes its text model, which is the file's `config_in`; or all of it."""
    if "wrapper" in data:
        return wrappers.text_config(config)
    place = data.get("config_in")
    if place is None:
        return config
    found = config.get(place)
    if not isinstance(found, Mapping):
        raise MlcBuildError(f"config.json: `{place}` is missing: there the architecture finds its text model")
    return found


def _fields(architecture: Architecture, values: Mapping[str, Any]) -> dict[str, Any]:
    """The structure's own fields among `values`."""
    wanted = {field.name: field for field in fields(Structure)}
    found = {name: value for name, value in values.items() if not name.startswith("_")}
    rest = {"architecture", "model_type", "rules", "ignored", *found}
    absent = [name for name, field in wanted.items() if field.default is MISSING and name not in rest]
    if absent:
        raise MlcBuildError(
            f"recipes/architectures/{architecture.name}.yaml: neither `config` nor `decoder` says {', '.join(absent)}"
        )
    return found


def _rules(rule: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[ParameterRule]:
    """The parameter of a line of the file and its bias, as far as the model has them."""
    when, layers = rule.get("when", True), None
    if "layer" in names_in(when):
        every = range(values["num_hidden_layers"])
        layers = tuple(layer for layer in every if evaluate(when, {**values, "layer": layer}))
        if not layers:
            return
        layers = None if len(layers) == len(every) else layers
    elif not evaluate(when, values):
        return
    convert = rule.get("convert", ())
    convert = (convert,) if isinstance(convert, str) else tuple(convert)
    others = _tensors(rule.get("or_from", ()))
    numbers = tuple((letter, tuple(evaluate(of, values))) for letter, of in rule.get("numbers", {}).items())
    times = float(evaluate(rule.get("times", 1.0), values))
    made = ParameterRule(
        rule["role"], rule["name"], _sources(rule), convert, layers, rule.get("dtype"), others, numbers, times
    )
    yield made
    if evaluate(rule.get("bias", False), values):
        role = made.role.removesuffix("_proj") + "_bias"
        names = (_bias(name) for name in made.sources)
        kept = tuple(each for each in convert if each != "transpose")
        others = tuple(map(_bias, made.alternative))
        yield replace(made, role=role, name=_bias(made.name), sources=tuple(names), convert=kept, alternative=others)


def _under(prefix: str, rule: ParameterRule) -> ParameterRule:
    """The rule with its checkpoint tensors under a wrapper's prefix, which may stand for the text model's `model.`."""
    inside = prefix.startswith("model.")

    def named(name: str) -> str:
        return (name.replace("model.", prefix, 1) if name.startswith("model.") else name) if inside else prefix + name

    sources, others = (tuple(map(named, names)) for names in (rule.sources, rule.alternative))
    return replace(rule, sources=sources, alternative=others)


def _bias(name: str) -> str:
    return f"{name.removesuffix('weight')}bias"


def _sources(rule: Mapping[str, Any]) -> tuple[str, ...]:
    return _tensors(rule.get("from", rule["name"]))


def _tensors(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _check_requirements(data: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, allowed in data.get("require", {}).items():
        if not unknown.allows(allowed, config, key):
            problems.append(
                f"config.json: {key} is {config[key]!r}, but this architecture computes only "
                f"{' or '.join(f'the `{a}` of {config[a]!r}' if str(a) in config else repr(a) for a in allowed)}"
            )
    scaling = config.get("rope_scaling")
    known = data.get("decoder", {}).get("rope_scaling", ())
    if scaling is not None and scaling["rope_type"] not in known:
        problems.append(
            f"config.json: rope scaling `{scaling['rope_type']}` is not one that this architecture computes "
            f"({', '.join(known) or 'none'})"
        )
    return problems


def _check_shape(values: Mapping[str, Any]) -> list[str]:
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    problems = []
    if heads % kv_heads:
        problems.append(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    problems += _check_layers(values) + _check_indexer(values)
    state_heads, state_groups = values.get("state_heads"), values.get("state_groups") or 1
    if state_heads is not None and state_heads % state_groups:
        problems.append(f"config.json: state_heads {state_heads} is not a multiple of state_groups {state_groups}")
    if values.get("differential") and kv_heads % 2:
        problems.append(f"config.json: num_key_value_heads {kv_heads} is odd: differential attention halves them")
    rotary, dim = values.get("rotary_dim"), values["qk_head_dim" if "qk_head_dim" in values else "head_dim"]
    scaling = values["rope_scaling"]
    if scaling is not None:
        problems += scaling_problems(scaling, (dim if rotary is None else rotary) // 2)
    if values.get("position_scale") and not values.get("position_scale_length"):
        problems.append(
            "config.json: scores grow with the position (llama_4_scaling_beta), but rope_parameters have no "
            "original_max_position_embeddings, from which on they do"
        )
    types, layers = values.get("layer_types"), values["num_hidden_layers"]
    known = ("full", "sliding") if values.get("kind") != HYBRID else ("full", "sliding", "state", "both", "mlp")
    if types is not None and (len(types) != layers or not {*types} <= {*known}):
        problems.append(
            f"config.json: layer_types are {types}, expected {' or '.join(known)} for each of {layers} layers"
        )
    alike = values.get("kind") == HYBRID and not values.get("convolutions")  # with these, attention has a state
    if alike and not ({*(types or ())} & {*KEEPING} and {*(types or ())} & {*ATTENDING}):
        problems.append(
            "config.json: of its layers, "
            + ("none has attention" if types and {*types} & {*KEEPING} else "all have attention and none a state")
            + ": a hybrid is built with layers of both"
        )
    turned = values.get("rope_layers")
    if turned is not None and len(turned) != layers:
        problems.append(f"config.json: {len(turned)} numbers say which layers have rotary positions, not {layers}")
    problems += [
        f"config.json: layer {layer} is to read the keys and values of layer {source}, expected those of an earlier "
        "layer of its type"
        for layer, source in enumerate(values.get("keys_from") or ())
        if source != layer and not (0 <= source < layer and types is not None and types[source] == types[layer])
    ]
    joins = values.get("joins")
    if joins is not None and not (len(joins) == layers and all(-1 <= join <= at for at, join in enumerate(joins))):
        problems.append(f"config.json: its {layers} layers cannot be gone through in such loops: {joins}"[:300])
    experts, groups, chosen = (values.get(k) or 1 for k in ("num_experts", "expert_groups", "expert_groups_per_tok"))
    if groups > 1 and (experts % groups or experts // groups < 2 or chosen > groups):
        problems.append(
            f"config.json: {experts} experts in {groups} groups, of which a token sees {chosen}: expected whole groups "
            "of at least 2, and as many of them or fewer"
        )
    return problems


def _check_layers(values: Mapping[str, Any]) -> list[str]:
    """Heads and rotary dimensions of each layer that has its own, or of all: the cache's heads are the most of them."""
    name, most = "qk_head_dim" if "qk_head_dim" in values else "head_dim", values["num_key_value_heads"]
    differ, problems = values.get("by_layer", ()), []
    for layer in range(values["num_hidden_layers"] if differ else 1):
        own = {**values, **{field: every[layer] for field, every in differ}}
        at = f"layer {layer}: " if differ else ""
        heads, kv_heads = own["num_attention_heads"], own["num_key_value_heads"]
        if differ and heads % kv_heads:
            problems.append(
                f"config.json: {at}num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if most % kv_heads:
            problems.append(
                f"config.json: {at}num_key_value_heads {kv_heads} does not divide the {most} of another layer"
            )
        rotary, dim = own.get("rotary_dim"), own[name]
        if rotary is not None and (rotary > dim or rotary % 2):
            problems.append(f"config.json: {at}rotary_dim is {rotary}, expected an even number up to {name} {dim}")
    return problems


def _check_indexer(values: Mapping[str, Any]) -> list[str]:
    """Of an index key is turned what is of other keys, and it fits into a head of the cache, key and value."""
    if not values["indexer"]:
        return []
    width, start, rotary = values["indexer"][2], values["indexer"][4], values.get("rotary_dim") or 0
    if values["context_window_size"] >= 1 << 24:
        return ["its indexer chooses keys in texts of fewer than 16,777,216 tokens: build with a shorter context"]
    if values["indexer"][5] and values.get("_index_types", ("full",))[0] != "full":
        return ["config.json: layer 0 is to attend to what the indexer of an earlier layer chose, and there is none"]
    if rotary + start <= width <= 2 * values["head_dim"] and rotary % 2 == 0:
        return []
    return [
        f"config.json: index_head_dim is {width}, expected one of at least the {rotary} numbers that are turned, and "
        f"at most {2 * values['head_dim']}"
    ]


def _capped(data: Mapping[str, Any], values: dict[str, Any], overrides: Mapping[str, int]) -> list[str]:
    """Cuts the context to what the file says at most (`context_at_most`); what is wrong with that, or an override."""
    if "context_at_most" not in data or values.get("indexer"):  # which chooses in longer ones
        return []
    key, most = data["context_at_most"], evaluate(data["context_at_most"], values)
    if type(most) is not int or most < 1:
        return [f"config.json: {key.strip('_')} is {most!r}, expected a whole number of at least 1"]
    values["context_window_size"] = min(values["context_window_size"], most)
    wanted = overrides.get("context_window_size", 1)
    if wanted <= most:
        return []
    return [
        f"overrides: context_window_size is {wanted}, but the model chooses {most} keys for each token "
        f"({key.strip('_')}): up to there it chooses all, and attention is computed without it; which it chooses of "
        f"more is not computed. Build with a context_window_size of {most} at most"
    ]


def _limits(kind: str, context: int, overrides: Mapping[str, int]) -> dict[str, int]:
    limits = {"context_window_size": context, **overrides}
    context = limits["context_window_size"]
    # An encoder sees a text at once or not at all.
    chunk = context if kind == ENCODER else _PREFILL_CHUNK_SIZE if context < 0 else min(context, _PREFILL_CHUNK_SIZE)
    limits.setdefault("prefill_chunk_size", chunk)
    limits.setdefault("max_batch_size", 1 if kind == ENCODER else _MAX_BATCH_SIZE)
    return limits


def _windows(values: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window_size` and `layer_types`, None where they change nothing: models that differ in no more share.

    A window that the text never leaves is none, and layers of one type need no list. An indexer that chooses all keys
    is none, either.
    """
    window, types = values.get("sliding_window_size"), values.get("layer_types")
    types = types if types is None else tuple(types)
    if window is not None and (window >= values["context_window_size"] or (types and "sliding" not in types)):
        window = None
    local = values.get("rope_local_theta") is not None
    attends_only = {*(types or ())} <= {"full", "sliding"}
    if attends_only and not local and (window is None or "full" not in (types or ())):
        types = None
    turned = values.get("rope_layers")
    turned = None if turned is None or all(turned) else tuple(map(bool, turned))
    sources = values.get("keys_from")
    sources = None if sources is None or list(sources) == list(range(len(sources))) else tuple(sources)
    chosen = values.get("indexer") or ()
    chosen = () if chosen and values["context_window_size"] <= chosen[0] else chosen
    found = {"sliding_window_size": window, "layer_types": types, "rope_layers": turned, "keys_from": sources}
    return {**found, "indexer": chosen}


def _check_limits(kind: str, values: Mapping[str, Any]) -> list[str]:
    problems = []
    if kind not in RECURRENT and values["context_window_size"] < 1:
        problems.append(
            f"context_window_size is {values['context_window_size']}, expected a whole number of at least 1: only a "
            "recurrent model has no end"
        )
    for name in ("tensor_parallel_shards", "pipeline_parallel_stages"):
        if values.get(name, 1) != 1:
            problems.append(f"overrides: {name} is {values[name]}, but only 1 is implemented")
    if 0 < values["context_window_size"] < values["prefill_chunk_size"]:
        problems.append(
            f"overrides: prefill_chunk_size {values['prefill_chunk_size']} is larger than context_window_size "
            f"{values['context_window_size']}"
        )
    rows = values.get("max_position_embeddings")
    positions = None if rows is None else rows - values.get("position_offset", 0)
    if positions is not None and values["context_window_size"] > positions:
        problems.append(
            f"overrides: context_window_size {values['context_window_size']} is larger than the {positions} positions "
            "that the model has learned"
        )
    return problems

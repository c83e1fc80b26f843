"""Fields of a structure read from `config.json` by the rules of an architecture file, and their checks.

Rules have small expressions: `hidden_size // num_attention_heads`, `not tie_word_embeddings`.
"""

from __future__ import annotations

import ast
import functools
import json
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.config import is_above, is_number
from mlcbuild.models.rule_functions import FUNCTIONS, MOST_LAYERS
from mlcbuild.models.structure import BY_LAYER

Values = Mapping[str, Any]

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda item, of: item in of,
    ast.NotIn: lambda item, of: item not in of,
}


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "context_window_size",
    "max_position_embeddings",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "rotary_dim",
    "sliding_window_size",
    "embedding_size",
    "expert_groups",
    "expert_groups_per_tok",
    "kv_lora_rank",
    "qk_head_dim",
    "value_head_dim",
    "state_size",
    "state_heads",
    "state_head_dim",
    "state_groups",
    "streams",
    "time_step_rank",
)
COUNTS = (
    "q_lora_rank",
    "shared_expert_intermediate_size",
    "moe_latent_size",
    "per_layer_size",
    "per_layer_rows",
    "laurel_rank",
    "mixture_rank",
    "ngram_table",
    "input_bits",
    "rescale_every",
    "time_mix_extra_dim",
    "time_decay_extra_dim",
    "position_offset",
    "zero_experts",
    "router_width",
    "key_experts",
    "key_experts_per_tok",
    "adapter_rank",
    "norm_gate_rank",
    "position_scale_length",
)
# What no model comes near. Layers and experts are gone through one by one, and every one has tensors of its own.
MOST_EXPERTS = 500_000  # of all layers together
LARGEST_HEAD, LARGEST_SIZE = 1 << 16, (1 << 31) - 1  # of and in heads; of all other sizes
_MOST = {
    **dict.fromkeys((*SIZES, *COUNTS, "conv_kernel"), LARGEST_SIZE),
    **dict.fromkeys(
        ("num_attention_heads", "num_key_value_heads", "head_dim", "qk_head_dim", "value_head_dim", "rotary_dim"),
        LARGEST_HEAD,
    ),
    "num_hidden_layers": MOST_LAYERS,
}
NUMBERS = (
    "norm_offset",
    "embedding_scale",
    "residual_scale",
    "logits_scale",
    "routed_scaling_factor",
    "router_jitter",
    "beta_scale",
    "mixer_scale",
    "mixer_out_scale",
    "attention_in_scale",
    "attention_out_scale",
    "gate_scale",
    "mlp_out_scale",
    "kept_scale",
    "decay_limit",
    "value_scale",
    "swiglu_alpha",
    "swiglu_offset",
    "hyper_magnitude",
    "hyper_eps",
    "activation_sparsity",
    "router_scale",
)
_POSITIVE = (
    "final_norm_eps",
    "state_norm_eps",
    "final_logit_softcapping",
    "attention_scale",
    "attn_logit_softcapping",
    "clip_qkv",
    "alibi_bias_max",
    "position_scale",
    "swiglu_limit",
    "router_logit_softcapping",
    "gate_softcapping",
)
_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(SIZES, ("a whole number of at least 1", lambda value: type(value) is int and value > 0)),
    **dict.fromkeys(COUNTS, ("a whole number", lambda value: type(value) is int and value >= 0)),
    **dict.fromkeys(NUMBERS, ("a number", is_number)),
    **dict.fromkeys(_POSITIVE, ("a number above 0", partial(is_above, 0))),
    "conv_kernel": ("a whole number of at least 2", lambda value: type(value) is int and value > 1),
    "ngrams": (
        "ten whole numbers: n-grams of 2 to 16 tokens, at most 64 hashes of each length, and none above 2,147,483,647",
        lambda value: value == () or _are_ngrams(value),
    ),
    "indexer": ("six whole numbers, three above 0, and an epsilon", lambda value: value == () or _is_indexer(value)),
    "convolutions": ("two whole numbers of at least 1", lambda value: _are_counts(value, 2)),
    "mixer_scales": ("five numbers", lambda value: _are_numbers(value, 5)),
    "time_step_limits": ("two numbers, the least and the largest step", lambda value: _is_range(value)),
    **dict.fromkeys(("rope_theta", "rope_local_theta"), ("a number above 1", partial(is_above, 1))),
}
CHOICES = {
    "mixer": ("conv", "mamba", "mamba2", "delta", "kda", "rglru", "lightning"),
    "state_gate": ("silu", "sigmoid"),
    "norm": ("rms", "layer"),
    "norm_position": ("pre", "post", "both", "sum"),
    "residual": ("sequential", "parallel"),
    "mlp": ("gated", "plain"),
    "rope": ("full", "none"),
    "rope_pairing": ("halves", "neighbours"),
    "qk_norm": ("none", "head", "per_head", "all", "unit"),
    "gate": ("first", "second"),
    "attention_gate": ("sigmoid", "softplus"),
    "scoring": ("softmax", "sigmoid", "logits", "sparse_mixer"),
    "head_activation": ("silu", "gelu", "gelu_tanh", "relu", "relu2"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu", "relu2", "xielu"),
}


def _are_counts(value: Any, count: int) -> bool:
    return _are_numbers(value, count) and all(type(each) is int and each > 0 for each in value)


def _are_ngrams(value: Any) -> bool:
    """Within what primes are looked for, and rows have numbers of 32 bits (mlcbuild.models.ngrams)."""
    return _are_counts(value, 10) and 2 <= value[0] <= 16 and value[1] <= 64 and max(value) < 2**31


def _is_indexer(value: Any) -> bool:
    return len(value) == 7 and _are_counts(value[:3], 3) and all(type(each) is int and each >= 0 for each in value[3:6])


def _is_range(value: Any) -> bool:
    return _are_numbers(value, 2) and bool(value[0] <= value[1])


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == count and all(map(is_number, value))


def read(rules: Mapping[str, Any], config: Values, given: Values) -> tuple[dict[str, Any], list[str]]:
    """`given` and what the rules make of `config`, and what is wrong with it.

    A rule's `default` and `value` are expressions over `given` and the other rules' fields, wherever these stand. Names
    with `_` in front are for such expressions only.
    """
    values: dict[str, Any] = dict(given)
    problems = []
    waiting = dict(rules)

    def add(field: str) -> None:
        rule = waiting.pop(field)
        for name in (name for part in ("value", "default", "if_null") for name in names_in(rule.get(part))):
            if name in waiting:
                add(name)
        try:
            values[field] = value_of(rule, config, values)
        except MlcBuildError as error:
            short = _short(rule, rules, values) if isinstance(error.__context__, IndexError) else None
            problem = f"config.json: {short or error}"
            if problem not in problems:
                problems.append(problem)

    while waiting:
        add(next(iter(waiting)))
    return values, problems


def _short(rule: Mapping[str, Any], rules: Mapping[str, Any], values: Values) -> str | None:
    """Which list of config.json that the rule goes through layer by layer ends before the layers do."""
    layers = values.get("num_hidden_layers")
    for name in (name for part in ("value", "default", "if_null") for name in names_in(rule.get(part))):
        found, names = values.get(name), keys(rules.get(name, {}))
        if names and isinstance(found, list | tuple) and isinstance(layers, int) and len(found) < layers:
            return f"`{'` or `'.join(names)}` has {len(found)} values, expected one for each of {layers} layers"
    return None


def value_of(rule: Mapping[str, Any], config: Values, values: Values) -> Any:
    """What `{key, default, if_null, map}` or `{value}` makes of a config.

    null is as if there were no such key, unless `if_null` says otherwise. Raises MlcBuildError where there is
    nothing to use, and for what is no truth value where the default is one.
    """
    if "value" in rule:
        return evaluate(rule["value"], values)
    names = keys(rule)
    for name in names:
        found = lookup(config, name)
        if found is not None:
            if "map" in rule:
                return _mapped(found, name, rule["map"])
            if isinstance(rule.get("default"), bool) and not isinstance(found, bool):
                raise MlcBuildError(f"{name} is {found!r}, expected true or false")
            return found
    if "if_null" in rule and any(name in config for name in names):
        return evaluate(rule["if_null"], values)
    if "default" in rule:
        return evaluate(rule["default"], values)
    raise MlcBuildError(f"`{'` or `'.join(names)}` is missing")


def keys(rule: Mapping[str, Any]) -> tuple[str, ...]:
    """The config's keys that a rule reads."""
    key = rule.get("key", ())
    return (key,) if isinstance(key, str) else tuple(key)


def lookup(config: Values, key: str) -> Any:
    """The value at `key`, or at `outer.inner`; None where there is none."""
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _mapped(value: Any, key: str, names: Mapping[str, Any]) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_mapped(each, key, names) for each in value)
    name = value if isinstance(value, str) else json.dumps(value)
    if name not in names:
        raise MlcBuildError(f"{key} is {value!r}, but this architecture computes only {' or '.join(map(repr, names))}")
    return names[name]


def by_layer(values: dict[str, Any]) -> list[str]:
    """Gives fields that have a value for each layer their largest, and `by_layer` all of them; what is wrong."""
    found, problems = [], []
    for name in (name for name in BY_LAYER if isinstance(values.get(name), list | tuple)):
        every, layers = tuple(values[name]), values.get("num_hidden_layers")
        wrong = [value for value in every if not is_number(value)]
        if wrong or len(every) != layers:
            problems.append(
                f"config.json: {name} is {list(every)!r:.100}, expected a number for each of {layers} layers"
            )
            values[name] = None
            continue
        values[name] = max(every)
        if len(set(every)) > 1:
            found.append((name, every))
            problems += [problem for value in set(every) for problem in check({name: value})]
    if found:
        values["by_layer"] = tuple(found)
    return problems


def check(values: Values) -> list[str]:
    """What is wrong with the types and ranges of fields."""
    problems = []
    for name, (expected, fits) in _EXPECTED.items():
        value = values.get(name)
        endless = (name, value) == ("context_window_size", -1)
        if value is not None and not endless and not fits(value):
            problems.append(f"config.json: {name} is {value!r:.100}, expected {expected}")
        if type(value) is int and value > _MOST.get(name, value):
            problems.append(f"config.json: {name} is {value:,}, and models of at most {_MOST[name]:,} are built")
    for name, words in (("norm_eps", "norm epsilon"), ("group_norm_eps", "epsilon of the norm over heads")):
        value = values.get(name, 0)
        if not is_number(value) or value < 0:
            problems.append(f"config.json: {words} is {value!r}, expected a number of at least 0")
    experts, chosen = (values.get(name) for name in ("num_experts", "num_experts_per_tok"))
    if not problems and experts is not None and chosen is not None and chosen > experts:
        problems.append(f"config.json: num_experts_per_tok is {chosen}, but there are only {experts} experts")
    if not problems and experts is not None and values["num_hidden_layers"] * experts > MOST_EXPERTS:
        problems.append(
            f"config.json: {values['num_hidden_layers']:,} layers of {experts:,} experts, and models of at most "
            f"{MOST_EXPERTS:,} experts in all are built"
        )
    for name, allowed in CHOICES.items():
        if name in values and values[name] not in allowed:
            problems.append(f"{name} is {values[name]!r}: the decoder computes only {', '.join(allowed)}")
    return problems


def evaluate(expression: object, names: Mapping[str, Any]) -> Any:
    """The value of an expression over `names`; anything but a string is its own value.

    Beside names, numbers, texts, tuples, True, False and None it may have `+ - * / // % **`, comparisons, `in`,
    `and or not`, `a if b else c`, int min max len, same(list), at(list, layer, x), and `each_layer(x)`: a tuple
    of x for `layer` from 0 to num_hidden_layers - 1. Raises MlcBuildError for anything else, and for unknown names.
    """
    if not isinstance(expression, str):
        return expression
    try:
        return _value(_parsed(expression).body, names)
    except (SyntaxError, KeyError, ZeroDivisionError, OverflowError, TypeError, ValueError, IndexError) as error:
        raise MlcBuildError(
            f"cannot evaluate `{expression}` ({error}); it may use numbers, `+ - * / // % **`, comparisons, "
            f"`and or not`, `a if b else c`, {', '.join(FUNCTIONS)}, each_layer, "
            f"and the names {', '.join(sorted(names))}"
        ) from None


@functools.cache
def _parsed(expression: str) -> ast.Expression:
    return ast.parse(expression, mode="eval")


def names_in(expression: object) -> tuple[str, ...]:
    """The names that an expression depends on, in its order; none where it is no expression."""
    return _names_in(expression) if isinstance(expression, str) else ()


@functools.cache
def _names_in(expression: str) -> tuple[str, ...]:
    try:
        tree = _parsed(expression)
    except SyntaxError:  # told by `evaluate`
        return ()
    return tuple(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Name(id=name):
            return names[name]
        case ast.Constant(value=value):
            return value
        case ast.Tuple(elts=items):
            return tuple(_value(item, names) for item in items)
        case ast.Subscript(value=of, slice=index):
            return _value(of, names)[_value(index, names)]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left, names), _value(right, names))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, names)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names)
        case ast.BoolOp(op=op, values=values):
            return (all if isinstance(op, ast.And) else any)(_value(value, names) for value in values)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return _COMPARE[type(op)](_value(left, names), _value(right, names))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, names) else orelse, names)
        case ast.Call(func=ast.Name(id="each_layer"), args=[item], keywords=[]):
            layers = min(names["num_hidden_layers"], MOST_LAYERS + 1)  # more are refused once all is read
            return tuple(_value(item, {**names, "layer": layer}) for layer in range(layers))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_value(arg, names) for arg in args))
    raise SyntaxError(f"`{ast.unparse(node)}` is not allowed")

"""A key that config.json leaves out means what transformers' configuration class has for it (fault A11).

config.json may leave out what is the class's default, and a checkpoint is made to be computed with that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.architecture import resolve
from mlcbuild.models.fields import keys
from tests.architectures.agreement import Case
from tests.architectures.cases import CASES
from tests.architectures.family_cases import CASES as FAMILIES
from tests.architectures.indexer_cases import CASES as INDEXERS
from tests.architectures.sink_cases import CASES as SINKS
from tests.support.architectures import known

ARCHITECTURES = known()
OF_TRANSFORMERS = {
    case.architecture: case
    for case in [*reversed([*FAMILIES.values(), *SINKS.values(), *INDEXERS.values()]), *CASES.values()]
    if case.shapes is None
}
# Such that every class's number of key-value heads divides the heads, and that no text is shorter than a window.
LARGE = {"num_attention_heads": 96, "n_head": 96, "hidden_size": 96 * 16, "n_embd": 96 * 128}
LARGE |= {"max_position_embeddings": 100_000}


def whole(case: Case, without: str) -> dict[str, Any]:
    """The case's config with the class's default at the key `without`."""
    from transformers import AutoConfig

    given = {key: LARGE.get(key, value) for key, value in case.config.items() if key not in ("model_type", without)}
    given = {key: value for key, value in given.items() if not (without == "rope_theta" and key == "rope_parameters")}
    found: dict[str, Any] = AutoConfig.for_model(case.config["model_type"], **given).to_dict()
    return found


def less(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    rope = config.get("rope_parameters")
    short = {name: value for name, value in config.items() if name != key}
    return {**short, "rope_parameters": {n: v for n, v in rope.items() if n != key}} if rope else short


def outcome(architecture: str, config: Mapping[str, Any]) -> object:
    try:
        return resolve(ARCHITECTURES[architecture], config, {}).to_json()
    except MlcBuildError as error:
        return str(error)


# Keys that a class infers from others which it then changes: a config.json has both, or the other one as it was.
INFERRED = {"hrm_text": {"num_layers_per_stack"}, "dory": {"layer_types"}}


def read_keys(architecture: str) -> list[str]:
    data = ARCHITECTURES[architecture].data
    read = [key for rule in data["config"].values() if "default" in rule for key in keys(rule) if "." not in key]
    wanted = dict.fromkeys([*read, *data.get("require", ()), "rope_theta"])
    return [key for key in wanted if key not in INFERRED.get(architecture, ())]


@pytest.mark.parametrize("architecture", OF_TRANSFORMERS)
def test_a11_a_key_that_is_absent_has_the_default_of_its_class(architecture: str) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    parted = {}
    for key in read_keys(architecture):
        try:
            config = whole(OF_TRANSFORMERS[architecture], key)
        except (StrictDataclassClassValidationError, ValueError):  # of this default and the other sizes: no such model
            continue
        ours = outcome(architecture, less(config, key))
        if ours != (theirs := outcome(architecture, config)):
            parted[key] = (ours, theirs)
    assert not parted


@pytest.mark.parametrize(
    ("architecture", "key", "field", "absent", "null"),
    [
        ("mistral", "sliding_window", "sliding_window_size", 4096, None),
        ("mistral", "num_key_value_heads", "num_key_value_heads", 8, 96),
        ("gemma2", "attn_logit_softcapping", "attn_logit_softcapping", 50.0, None),
        ("gemma2", "final_logit_softcapping", "final_logit_softcapping", 30.0, None),
        ("gptj", "rotary_dim", "rotary_dim", 64, 128),
    ],
)
def test_null_is_not_always_as_if_there_were_no_such_key(
    architecture: str, key: str, field: str, absent: object, null: object
) -> None:
    config = less(whole(OF_TRANSFORMERS[architecture], key), key)
    known = ARCHITECTURES[architecture]
    assert getattr(resolve(known, config, {}), field) == absent
    assert getattr(resolve(known, {**config, key: None}, {}), field) == null

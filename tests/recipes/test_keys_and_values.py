"""What the schemas refuse, and how it is said."""

from __future__ import annotations

import time

import pytest

from mlcbuild.recipes.files import stock
from mlcbuild.recipes.schemas import Schemas
from tests.recipes.conftest import RECIPE, Workspace

MODEL = "source: {path: .}\ntemplate: chatml\n"
QUANTIZATION = (
    "class: q4\nmodel_dtype: float16\n"
    "weights: {bits: 4, group_size: 32, storage_dtype: uint32, layout: NK, symmetric: true}\n"
)
TARGET = (
    "device: {kind: llvm, mtriple: x86_64-linux-gnu, mcpu: x86-64-v3}\nlibrary: so\n"
    "linker: {kind: zig, target: native}\nexecutes: x86-64-v3\n"
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        # keys
        (RECIPE.replace("model:", "modle:"), "1:1: unknown key `modle`; did you mean `model`?"),
        (RECIPE.replace("quantization:", "quant:"), "2:1: unknown key `quant`; did you mean `quantization`?"),
        (
            RECIPE + "colour: blue\n",
            "4:1: unknown key `colour`; "
            "expected `model`, `quantization`, `target`, `template`, `overrides`, `verify` or `manual`",
        ),
        (
            RECIPE + "overrides:\n  context_windw_size: 64\n",
            "5:3: unknown key `context_windw_size` in `overrides`; did you mean `context_window_size`?",
        ),
        (
            "model: tiny\ntarget: cpu\n",
            "1:1: `quantization` is missing: a file of recipes/quantizations/, without its ending",
        ),
        # values
        (
            RECIPE + "verify: {gate: fial}\n",
            "4:16: `verify.gate` is `fial`, expected `fail` or `report`; did you mean `fail`?",
        ),
        (RECIPE + "verify: {gate: never}\n", "4:16: `verify.gate` is `never`, expected `fail` or `report`"),
        (RECIPE + "verify: {kl: 0}\n", "4:14: `verify.kl` is `0`, expected more than 0"),
        (RECIPE + "verify: {kl: .nan}\n", "4:14: `verify.kl` is `.nan`, expected a number"),
        (RECIPE + "verify: {}\n", "4:9: `verify`: expected something, not nothing"),
        (RECIPE + "verify:\n", "4:8: `verify` is empty, expected a mapping of keys to values"),
        (
            RECIPE + "overrides: {context_window_size: big}\n",
            "4:34: `overrides.context_window_size` is `big`, expected a whole number",
        ),
        (
            RECIPE + "overrides: {context_window_size: 64.0}\n",
            "4:34: `overrides.context_window_size` is `64.0`, expected a whole number",
        ),
        (
            RECIPE + "overrides: {context_window_size: '64'}\n",
            '4:34: `overrides.context_window_size` is `"64"`, expected a whole number',
        ),
        (
            RECIPE + "overrides: {context_window_size: 0}\n",
            "4:34: `overrides.context_window_size` is `0`, expected at least 1",
        ),
        (
            RECIPE + "overrides: {context_window_size: 2147483648}\n",
            "4:34: `overrides.context_window_size` is `2147483648`, expected at most 2147483647",
        ),
        (
            RECIPE + "overrides: {tensor_parallel_shards: 2}\n",
            "4:37: `overrides.tensor_parallel_shards` is `2`, expected 1: more than one shard is not implemented",
        ),
        (
            RECIPE + "overrides: {pipeline_parallel_stages: 4}\n",
            "4:39: `overrides.pipeline_parallel_stages` is `4`, expected 1: more than one stage is not implemented",
        ),
        (
            RECIPE + "overrides: {sliding_window_size: 64}\n",
            "4:13: unknown key `sliding_window_size` in `overrides`; expected `context_window_size`, "
            "`prefill_chunk_size`, `max_batch_size`, `tensor_parallel_shards` or `pipeline_parallel_stages`",
        ),
        (RECIPE.replace("tiny", "7"), "1:8: `model` is `7`, expected text; write it in quotes"),
        (
            RECIPE.replace("tiny", "../tiny"),
            "1:8: `model` is `../tiny`, expected a name: letters, digits, `.`, `_` and `-`, "
            "starting with a letter or a digit",
        ),
        (
            RECIPE.replace("tiny", '"tiny\\n"'),
            '1:8: `model` is `"tiny\\n"`, expected a name: letters, digits, `.`, `_` and `-`, '
            "starting with a letter or a digit",
        ),
    ],
)
def test_recipe(workspace: Workspace, text: str, problem: str) -> None:
    assert workspace.problem("bad.yaml", text) == problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "template: chatml\n",
            "1:1: `source` is missing: where the checkpoint is: a local folder or GGUF file, or a Hugging Face "
            "repository",
        ),
        (
            "source: {path: .}\n",
            "1:1: `template` is missing: a file of recipes/templates/: how a conversation becomes text",
        ),
        (MODEL.replace("path: .", "path: ., hf: a/b"), "1:9: `source`: expected one of `path` and `hf`, not both"),
        (
            MODEL.replace("path: .", "path: ., revision: main"),
            "1:9: `source`: expected no `revision` beside `path`: only a repository has revisions",
        ),
        (MODEL.replace("path: .", "hf: a/b/c"), "1:14: `source.hf` is `a/b/c`, expected a repository: `owner/name`"),
        (MODEL.replace("path: .", "hf: ../b"), "1:14: `source.hf` is `../b`, expected a repository: `owner/name`"),
        (MODEL.replace("path: .", "revision: main"), "1:9: `source`: expected `path` or `hf`"),
        (
            MODEL.replace("path: .", "hf: a/b, revision: 1234567"),
            "1:29: `source.revision` is `1234567`, expected text; write it in quotes",
        ),
        (MODEL.replace("path: .", 'path: "a\\0b"'), '1:16: `source.path` is `"a\\u0000b"`, expected a path'),
        (MODEL.replace("path: .", ""), "1:9: `source`: expected something, not nothing"),
    ],
)
def test_model(workspace: Workspace, text: str, problem: str) -> None:
    assert workspace.problem("models/bad.yaml", text) == problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            QUANTIZATION.replace("q4", "q5"),
            "1:8: `class` is `q5`, expected `q0`, `q3`, `q4` or `q8`; did you mean `q0`?",
        ),
        (
            QUANTIZATION.replace("q4", "q0"),
            "1:1: expected no `weights`, `embedding`, `lm_head`, `overrides`, `bits_per_weight`, `formats` or "
            "`rounding` where `class` is q0: it quantizes nothing",
        ),
        (
            "class: q4\nmodel_dtype: float16\n",
            "1:1: `weights` is missing: how weight matrices [N out, K in] are quantized: "
            "in groups along K that share a scale",
        ),
        (QUANTIZATION.replace("bits: 4", "bits: 9"), "3:17: `weights.bits` is `9`, expected at most 8"),
        (QUANTIZATION.replace("bits: 4", "bits: 3"), "3:32: `weights.group_size` is `32`, expected a multiple of 10"),
        (QUANTIZATION.replace("bits: 4", "bits: '4'"), '3:17: `weights.bits` is `"4"`, expected a whole number'),
        (QUANTIZATION.replace("size: 32", "size: 20"), "3:32: `weights.group_size` is `20`, expected a multiple of 8"),
        (
            QUANTIZATION.replace("true", "false"),
            "3:10: `weights.packed_scale_min` is missing: asymmetric groups need it, as bf16x2",
        ),
        (
            QUANTIZATION.replace("true", "false, packed_scale_min: bf16x2"),
            "2:14: `model_dtype` is `float16`, expected `float32` with packed_scale_min",
        ),
        (
            QUANTIZATION.replace("true", "true, packed_scale_min: bf16x2"),
            "3:10: `weights`: expected no `packed_scale_min` where `symmetric` is true: there is no minimum",
        ),
        (
            QUANTIZATION.replace("{bits", "{scheme: awq, bits").replace("true", "false"),
            "3:80: `weights.layout` is `NK`, expected `KN` with scheme awq",
        ),
        (
            "class: q8\nmodel_dtype: float16\n"
            "weights: {scheme: minmax_outer, bits: 8, group_size: 32, storage_dtype: uint8, layout: KN, "
            "symmetric: false}\n",
            "3:10: `weights`: expected no `group_size` with scheme minmax_outer: it has no groups",
        ),
        (
            QUANTIZATION.replace("group_size: 32, ", ""),
            "3:10: `weights.group_size` is missing: values along K that share a scale: a whole number of storage words",
        ),
        (
            "format: q4f16_1\n",
            "1:1: `rounding` is missing: nearest: the scale comes from the group's largest value, bit for bit as MLC "
            "writes it",
        ),
        (
            "format: q4f16_1\nrounding: mse\nclass: q4\n",
            "1:1: expected nothing but `rounding` and `description` beside `format`: the rest is that format's",
        ),
        (
            "format: q4f16_2x\nrounding: mse\n",
            "1:9: `format` is `q4f16_2x`, expected a name of recipes/quantizations/; did you mean `q4f16_2`?",
        ),
        (
            "format: q4f16_1-mse\nrounding: mse\n",
            "1:9: `format` is `q4f16_1-mse`, which is no format of its own; name the one whose bytes it has",
        ),
        (
            QUANTIZATION + "overrides: {lm_head: q8f32_1}\n",
            "4:22: `overrides.lm_head` is `q8f32_1`, whose model_dtype is float32; expected one with float16, as here",
        ),
        (
            QUANTIZATION + "overrides: {lm_head: q4f16_1-mse}\n",
            "4:22: `overrides.lm_head` is `q4f16_1-mse`, which only rounds otherwise; name the format of its bytes",
        ),
        (
            QUANTIZATION + "overrides: {lm_head: q8f16_}\n",
            "4:22: `overrides.lm_head` is `q8f16_`, expected a name of recipes/quantizations/; did you mean `q8f16_0`?",
        ),
    ],
)
def test_quantization(workspace: Workspace, text: str, problem: str) -> None:
    assert workspace.problem("quantizations/bad.yaml", text) == problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            TARGET.replace("x86_64-linux-gnu", "linux"),
            "1:31: `device.mtriple` is `linux`, expected an LLVM triple such as `x86_64-linux-gnu`",
        ),
        (
            TARGET + "host: {mtriple: x86_64-linux-gnu}\n",
            "5:7: `host`: expected no `host`: the device is a CPU itself",
        ),
        (
            "device: {kind: opencl}\nhost: {mtriple: x86_64-linux-gnu}\nlibrary: so\nactivation_bits: 8\n"
            "linker: {kind: zig, target: x86_64-linux-gnu}\nexecutes: elsewhere\n",
            "4:18: `activation_bits` is `8`, expected a CPU target: GPU libraries compute in the model's dtype",
        ),
        (
            "device: {kind: opencl}\nhost: {mtriple: x86_64-linux-gnu}\nlibrary: tar\n"
            "linker: {kind: tar, target: native}\nexecutes: elsewhere\n",
            "4:29: `linker.target` is `native`, expected no `target`: the linker `tar` only packs",
        ),
        (
            TARGET.replace("mtriple: x86_64-linux-gnu, ", ""),
            "1:9: `device.mtriple` is missing: an LLVM target triple",
        ),
        (
            TARGET.replace("mcpu: x86-64-v3", "mcpu: native").replace("executes: x86-64-v3", "executes: native"),
            "1:9: `device`: expected no `mtriple` and no `mattr` beside `mcpu: native`, which sets both",
        ),
        (
            TARGET.replace("executes: x86-64-v3", "executes: native"),
            "4:11: `executes` is `native`, expected an x86-64 level or `elsewhere`, as `device.mcpu` is not `native`",
        ),
        (
            TARGET.replace("executes: x86-64-v3", "executes: x86-64-v5"),
            "4:11: `executes` is `x86-64-v5`, expected `native`, `x86-64`, `x86-64-v2`, `x86-64-v3`, `x86-64-v4`, "
            "`aarch64` or `elsewhere`; did you mean `x86-64-v2`?",
        ),
        (
            TARGET.replace("mcpu: x86-64-v3", "mcpu: x86-64-v3, mattr: [avx512vnni]"),
            "1:74: `device.mattr[0]` is `avx512vnni`, expected an LLVM feature with its sign, such as `+avx512vnni`",
        ),
    ],
)
def test_target(workspace: Workspace, text: str, problem: str) -> None:
    assert workspace.problem("targets/bad.yaml", text) == problem


def test_linker(workspace: Workspace) -> None:
    text = TARGET.replace("target: native", "target: linux, needs: [libm]")
    workspace.write("targets/bad.yaml", text)
    assert workspace.problems() == [
        "recipes/targets/bad.yaml:3:29: `linker.target` is `linux`, expected a zig triple such as "
        "`x86_64-linux-gnu.2.28`, or `native`",
        "recipes/targets/bad.yaml:3:44: `linker.needs[0]` is `libm`, expected a library's soname such as `libm.so.6`",
    ]


def test_template(workspace: Workspace) -> None:
    text = "roles: {user: U, asistant: A}\nseps: [a, b, c]\n"
    workspace.write("templates/bad.yaml", text)
    assert workspace.problems() == [
        "recipes/templates/bad.yaml:1:18: unknown key `asistant` in `roles`; did you mean `assistant`?",
        "recipes/templates/bad.yaml:2:7: `seps`: expected at most 2 entries",
    ]


def test_architecture(workspace: Workspace) -> None:
    text = (stock().recipes / "architectures" / "llama.yaml").read_text()
    text = (
        text.replace("role: o_proj", "role: o_prj")
        .replace("norm: rms", "norm: batch")
        .replace("head_dim: {key", "hed_dim: {key")
    )
    workspace.write("architectures/bad.yaml", text)
    keys, norm, role = (problem.split(": ", 1)[1] for problem in workspace.problems())
    assert keys == "unknown key `hed_dim` in `config`; did you mean `head_dim`?"
    assert norm == "`decoder.norm` is `batch`, expected `rms` or `layer`"
    assert role.startswith("`parameters[2].role` is `o_prj`, expected one of `embedding`, ")
    assert role.endswith("; did you mean `o_proj`?")


def test_all_problems_of_all_files_in_one_go(workspace: Workspace) -> None:
    workspace.write("a.yaml", "modle: tiny\nquantization: q4f16_1\ntarget: cpu\nverify: {gate: x, kl: no}\n")
    workspace.write("b.yaml", "model: tiny\n")
    workspace.write("models/c.yaml", "template: chatml\nsource: {hf: 7}\noverrides: {max_batch_size: many}\n")
    assert [problem.split(":")[0:2] for problem in workspace.problems()] == [
        ["recipes/a.yaml", "1"],
        ["recipes/a.yaml", "4"],
        ["recipes/a.yaml", "4"],
        ["recipes/b.yaml", "1"],
        ["recipes/b.yaml", "1"],
        ["recipes/models/c.yaml", "2"],
        ["recipes/models/c.yaml", "3"],
    ]


def _closed_objects(schema: object, path: str) -> list[tuple[str, dict[str, object]]]:
    """(place, properties) of every object of a schema whose keys are closed."""
    if isinstance(schema, list):
        return [found for number, item in enumerate(schema) for found in _closed_objects(item, f"{path}[{number}]")]
    if not isinstance(schema, dict):
        return []
    own = [(path, schema["properties"])] if schema.get("additionalProperties") is False else []
    skipped = ("examples", "default", "enum")
    inner = [f for key, value in schema.items() if key not in skipped for f in _closed_objects(value, f"{path}/{key}")]
    return own + inner


def _typos(word: str) -> set[str]:
    """Every word with one letter left out, doubled, replaced or swapped with the next."""
    cuts = [(word[:i], word[i:]) for i in range(len(word))]
    typos = {a + b[1:] for a, b in cuts} | {a + b[0] + b for a, b in cuts} | {f"{a}x{b[1:]}" for a, b in cuts}
    typos |= {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    return typos - {word, ""}


def test_every_typo_of_every_key_gets_a_suggestion() -> None:
    from mlcbuild.recipes.problems import nearest

    checked = 0
    for kind, schema in Schemas(stock().schema).contents.items():
        for place, properties in _closed_objects(schema, kind):
            for key in properties:
                for typo in _typos(key) - set(properties):
                    meant = nearest(typo, properties)
                    assert meant == key or meant in _neighbours(typo, properties), (
                        f"{place}: {typo}: {meant}, not {key}"
                    )
                    checked += 1
    assert checked > 1000


@pytest.mark.parametrize(
    ("typo", "names", "meant"),
    [
        ("q4f16_l", ("q4f16_0", "q4f16_1", "q4f16_2"), "q4f16_1"),
        ("q4f16_O", ("q4f16_0", "q4f16_1"), "q4f16_0"),
        ("q4f16-1", ("q4f16_0", "q4f16_1"), "q4f16_1"),
        ("1lama3.2", ("llama3.1", "llama3.2", "olama3.2"), "llama3.2"),
        ("q4f16_", ("q4f16_0", "q4f16_1", "q4f16_1-gptq", "q4f16_1-mse"), "q4f16_1"),
        ("q4f16_2", ("q4f16_0", "q4f16_1"), "q4f16_0"),
    ],
)
def test_of_names_as_near_the_one_that_looks_alike(typo: str, names: tuple[str, ...], meant: str) -> None:
    """Then the one that other names begin with, then the first."""
    from mlcbuild.recipes.problems import nearest

    assert nearest(typo, names) == nearest(typo, names[::-1]) == meant


def _neighbours(typo: str, keys: dict[str, object]) -> list[str]:
    # `pth` and the like can be a typo of two keys: either is a fair suggestion.
    def replaced(key: str) -> bool:
        return len(key) == len(typo) and sum(a != b for a, b in zip(key, typo, strict=True)) == 1

    return [key for key in keys if typo in _typos(key) or key in _typos(typo) or replaced(key)]


def test_the_nearest_of_many_names_is_found_soon() -> None:
    """Names that are as near as each other were compared with all names."""
    from mlcbuild.recipes.problems import nearest

    names = [f"tiny-{number:05}" for number in range(10_000)] + ["tiny-model"]
    start = time.monotonic()
    assert nearest("tiny-0000x", names) == "tiny-00000"
    assert nearest("tiny-modle", names) == "tiny-model"
    assert nearest("tiny", names) == "tiny-00000"
    assert time.monotonic() - start < 20

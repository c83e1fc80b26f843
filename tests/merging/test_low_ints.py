"""Matrices of whole numbers of a few bits: the floats that the programs which packed them make of them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from mlcbuild.checkpoints.header import TensorRef, read_header
from mlcbuild.errors import CheckpointError
from mlcbuild.merging import low_ints, prequantized
from tests.merging.test_low_floats import made, plain
from tests.merging.test_prequantized import CONFIG, LINEAR

Array = npt.NDArray[Any]
N, K = 96, 256


def table(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorRef]:
    path = folder / "model.safetensors"
    save_file({name: each.contiguous() for name, each in tensors.items()}, path)
    return {ref.name: ref for ref in read_header(path, path.name)}


def numbers(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, Array]:
    """What `tensors` stand for under this config.json, by name; nothing else is left of them."""
    scheme = prequantized.scheme(config)
    assert scheme is not None
    if scheme.method in prequantized.METHODS:
        left, layers = prequantized.plan(table(folder, tensors), scheme)
        found = [prequantized.numbers(layer) for layer in layers.values()]
    else:
        left, found = low_ints.plan(table(folder, tensors), scheme)
    assert left.keys() == {each.target.name for each in found}
    values = {each.target.name: np.concatenate(list(each.pieces())) for each in found}
    assert all(values[each.target.name].shape == each.target.shape for each in found)
    return values


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", ["group", "channel", "tensor", "asymmetric"])
def test_compressed_tensors(kind: str, bits: int, tmp_path: Path) -> None:
    """Packed by the package itself; its floats are in the scales' dtype."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = kind if kind in ("group", "channel", "tensor") else "group"
    args = QuantizationArgs(num_bits=bits, type="int", strategy=strategy, symmetric=kind != "asymmetric",
                            group_size=32 if strategy == "group" else None)  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    groups = {"group": (N, K // 32), "channel": (N, 1), "tensor": (1,)}[strategy]
    state = {"weight": random(N, K).bfloat16(), "weight_scale": (random(*groups, seed=1).abs() * 0.1 + 0.05).bfloat16()}
    if kind == "asymmetric":
        low = 1 << (bits - 1)
        state["weight_zero_point"] = torch.randint(-low, low, groups, dtype=torch.int8)
    packed = PackedQuantizationCompressor.compress(dict(state), scheme)
    meant = PackedQuantizationCompressor.decompress(dict(packed), scheme)["weight"]
    packed = {name: each for name, each in packed.items() if isinstance(each, torch.Tensor)}
    config = {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": args.model_dump()}, "group_1": {"weights": {"num_bits": 7}}},
        }
    }
    if "weight_shape" not in packed:
        packed["weight_shape"] = torch.tensor([N, K])
    found = numbers(tmp_path, {f"x.{name}": each for name, each in packed.items()}, config)
    assert found.keys() == {"x.weight"}
    np.testing.assert_array_equal(torch.tensor(found["x.weight"]).bfloat16().float(), meant.float())


def test_compressed_tensors_in_another_order_of_columns(tmp_path: Path) -> None:
    """g_idx: the group of each column. A later version of the package no longer writes it."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes, scales = torch.randint(-8, 8, (N, K), dtype=torch.int8), (random(N, K // 32) * 0.1).bfloat16()
    order = torch.randperm(K, generator=torch.Generator().manual_seed(2)).to(torch.int32) // 32
    given = {"x.weight_packed": pack_to_int32(codes, 4), "x.weight_scale": scales, "x.weight_g_idx": order,
             "x.weight_shape": torch.tensor([N, K])}  # fmt: skip
    config = {"quantization_config": {"quant_method": "compressed-tensors",
              "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int", "actorder": "group"}}}}}  # fmt: skip
    np.testing.assert_array_equal(
        numbers(tmp_path, given, config)["x.weight"], codes.float() * scales.float()[:, order]
    )


def test_compressed_tensors_of_int8(tmp_path: Path) -> None:
    words, scales = torch.randint(-128, 128, (N, K), dtype=torch.int8), (random(N, 1).abs() * 0.1).bfloat16()
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized",
              "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}}}  # fmt: skip
    given = {"x.weight": words, "x.weight_scale": scales, "x.input_scale": torch.ones(1)}
    found = numbers(tmp_path, given, config)["x.weight"]
    np.testing.assert_array_equal(found, words.float() * scales.float())


@pytest.mark.parametrize("location", ["weight_input", "weight_output", "input", "output", "q_attn", "k_cache"])
def test_compressed_tensors_that_were_turned(location: str) -> None:
    """What is fused into weights is read; what is computed while the model runs is not (the package says which)."""
    from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme

    args = TransformArgs(targets=["Linear"], location=location)
    turned = TransformConfig(config_groups={"r": TransformScheme(type="hadamard", apply=[args])})
    written = turned.model_dump(mode="json", exclude={"config_groups": {"r": {"precision"}}})
    config = {"quantization_config": {"quant_method": "compressed-tensors",
              "config_groups": {"g": {"weights": {"num_bits": 4}}},
              "transform_config": written}}  # fmt: skip
    if not args.is_online():
        assert prequantized.scheme(config) is not None
        return
    with pytest.raises(CheckpointError) as error:
        prequantized.scheme(config)
    assert str(error.value) == (
        f"config.json: quantization_config.transform_config: transforms with location {location} are computed while "
        "the model runs; only those of weights are read; use the model's unquantized checkpoint"
    )


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_of_4_bits(kind: str, double: bool, storage: torch.dtype, tmp_path: Path) -> None:
    """Packed, and made floats of again, by bitsandbytes on the CPU; held as larger numbers as FSDP wants it."""
    from bitsandbytes import functional

    weight = random(N, K)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double, quant_type=kind, quant_storage=storage
    )
    given = {f"x.weight.{name}": each for name, each in state.as_dict(packed=True).items()}
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    found = numbers(tmp_path, {"x.weight": packed, **given}, config)["x.weight"]
    np.testing.assert_allclose(found, functional.dequantize_4bit(packed, state), rtol=3e-7, atol=0)


def test_bitsandbytes_of_8_bits(tmp_path: Path) -> None:
    from bitsandbytes import functional

    words, stats, _ = functional.int8_vectorwise_quant(random(N, K).half())
    given = {"x.weight": words, "x.SCB": stats, "x.weight_format": torch.zeros(1, dtype=torch.uint8)}
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    found = numbers(tmp_path, given, config)["x.weight"]
    np.testing.assert_allclose(found, functional.int8_vectorwise_dequant(words, stats), rtol=3e-7, atol=0)


def dense(codes: Array, bits: int) -> torch.Tensor:
    """Rows of codes as rows of 32-bit words, one bit after the other."""
    rows = []
    for row in codes:
        whole = sum(int(code) << (bits * i) for i, code in enumerate(row))
        rows.append(np.frombuffer(whole.to_bytes(-(-len(row) * bits // 32) * 4, "little"), "<u4"))
    return torch.tensor(np.stack(rows).view(np.int32))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx(bits: int, tmp_path: Path) -> None:
    """w = scale * code + bias (ml-explore/mlx, quantize); one layer has other groups."""
    generator = np.random.default_rng(bits)
    given: dict[str, torch.Tensor] = {}
    meant: dict[str, Array] = {}
    config = {"quantization": {"bits": bits, "group_size": 64, "y": {"bits": 8, "group_size": 32}}}
    for name, own, group in (("x", bits, 64), ("y", 8, 32)):
        codes = generator.integers(0, 1 << own, (N, K))
        scales, biases = (torch.tensor(generator.normal(0, 0.1, (N, K // group))).bfloat16() for _ in range(2))
        given |= {
            f"{name}.weight": dense(codes, own).view(torch.uint32),
            f"{name}.scales": scales,
            f"{name}.biases": biases,
        }
        wide = [each.float().numpy().repeat(group, axis=1) for each in (scales, biases)]
        meant[f"{name}.weight"] = codes.astype(np.float32) * wide[0] + wide[1]
    found = numbers(tmp_path, given, config)
    assert found.keys() == meant.keys()
    assert all(np.array_equal(found[name], meant[name]) for name in found)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gptq_of_other_bits(bits: int, tmp_path: Path) -> None:
    """AutoGPTQ's packing: codes along K, zero points along N less 1, one bit after the other."""
    generator = np.random.default_rng(bits)
    codes, zeros = generator.integers(0, 1 << bits, (N, K)), generator.integers(1, 1 << bits, (K // 64, N))
    scales = torch.tensor(generator.uniform(0.01, 0.1, (K // 64, N))).half()
    given = {"x.qweight": dense(codes, bits).T, "x.qzeros": dense(zeros - 1, bits), "x.scales": scales}
    config = {"quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": 64}}
    meant = (codes - zeros.T.repeat(64, axis=1)) * scales.float().numpy().T.repeat(64, axis=1)
    np.testing.assert_array_equal(numbers(tmp_path, given, config)["x.weight"], meant.astype(np.float16))


def test_awq_for_one_row(tmp_path: Path) -> None:
    """AutoAWQ's gemv: codes along K, zero points along groups, both in their order, padded."""
    generator = np.random.default_rng(0)
    codes, zeros = generator.integers(0, 16, (N, K)), generator.integers(0, 16, (N, K // 64))
    scales = torch.tensor(generator.uniform(0.01, 0.1, (N, K // 64))).half()
    padded = torch.nn.functional.pad(scales, (0, 16 - K // 64))
    given = {"x.qweight": dense(codes, 4), "x.qzeros": dense(np.pad(zeros, ((0, 0), (0, 12))), 4), "x.scales": padded}
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}}
    meant = (codes - zeros.repeat(64, axis=1)) * scales.float().numpy().repeat(64, axis=1)
    np.testing.assert_array_equal(numbers(tmp_path, given, config)["x.weight"], meant.astype(np.float32))


def test_the_same_package_as_from_its_floats(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    stored, meant = plain(), plain()
    for name, (n, k) in LINEAR.items():
        codes = generator.integers(0, 16, (n, k))
        scales, biases = (torch.tensor(generator.normal(0, 0.02, (n, k // 32))).half() for _ in range(2))
        at = f"model.layers.0.{name}"
        stored |= {f"{at}.weight": dense(codes, 4).view(torch.uint32), f"{at}.scales": scales, f"{at}.biases": biases}
        wide = [each.float().repeat_interleave(32, dim=1) for each in (scales, biases)]
        meant[f"{at}.weight"] = torch.tensor(codes).float() * wide[0] + wide[1]
    packed = made(tmp_path / "packed", stored, {**CONFIG, "quantization": {"bits": 4, "group_size": 32}})
    assert packed == made(tmp_path / "floats", meant, CONFIG)


BNB = {"quantization_config": {"quant_method": "bitsandbytes"}}
COMPRESSED = {"quantization_config": {"quant_method": "compressed-tensors",
              "config_groups": {"g": {"weights": {"num_bits": 4}}}}}  # fmt: skip
GEMV = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}}
MLX = {"quantization": {"bits": 4, "group_size": 64}}


def bnb(**changes: Any) -> dict[str, torch.Tensor]:
    """Numbers [2, 32], doubly quantized, with other metadata."""
    state = {"shape": [2, 32], "blocksize": 16, "nested_blocksize": 2, "nested_offset": 0.5, **changes}
    return {"x.weight": torch.zeros((32, 1), dtype=torch.uint8), "x.weight.quant_map": torch.ones(16),
            "x.weight.absmax": torch.ones(4, dtype=torch.uint8), "x.weight.nested_absmax": torch.ones(2),
            "x.weight.nested_quant_map": torch.ones(256),
            "x.weight.quant_state.bitsandbytes__nf4": torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8),
            }  # fmt: skip


def compressed() -> dict[str, torch.Tensor]:
    return {"x.weight_packed": torch.zeros((2, 4), dtype=torch.int32), "x.weight_scale": torch.ones((2, 1)),
            "x.weight_shape": torch.tensor([2, 32])}  # fmt: skip


def mlx() -> dict[str, torch.Tensor]:
    return {"x.weight": torch.zeros((2, 8), dtype=torch.uint32), "x.scales": torch.ones((2, 1)),
            "x.biases": torch.ones((2, 1))}  # fmt: skip


def gemv() -> dict[str, torch.Tensor]:
    return {"x.qweight": torch.zeros((2, 8), dtype=torch.int32), "x.qzeros": torch.zeros((2, 1), dtype=torch.int32),
            "x.scales": torch.ones((2, 1)).half()}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "tensors", "problem"),
    [
        ({"quantization": {"bits": 4, "group_size": 64, "mode": "mxfp4"}}, {},
         "MLX has mode 'mxfp4', bits 4 and group_size 64: only its affine groups are read; use the checkpoint"),
        ({"quantization": {"bits": 4, "group_size": 64}}, {}, "was quantized by mlx, but it has no such tensors"),
        ({"quantization": {"bits": 4, "group_size": 64}},
         {"x.weight": torch.zeros((2, 7), dtype=torch.uint32), "x.scales": torch.ones((2, 1))},
         "tensor x.weight: U32 [2, 7], but [2, 1] scales of groups of 64 want words of 2 to 8 bits"),
        ({"quantization": {"bits": 4, "group_size": 64}},
         {"x.weight": torch.zeros((2, 8), dtype=torch.uint32), "x.scales": torch.ones((2, 1))},
         "tensor x.scales: there is no x.biases beside it"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}},
         {f"x.weight{end}": torch.zeros(4, dtype=torch.uint8) for end in ("", ".quant_state.bitsandbytes__nf4")},
         "quant_state.bitsandbytes__nf4: not the JSON that bitsandbytes writes"),
        (BNB, bnb(nested_offset=None), "__nf4: not the JSON that bitsandbytes writes of a matrix"),
        (BNB, bnb(nested_blocksize=0), "__nf4: not the JSON that bitsandbytes writes of a matrix"),
        (BNB, bnb(shape=[-2, -32]), "__nf4: not the JSON that bitsandbytes writes of a matrix"),
        (BNB, bnb(shape=[4, 32]), "tensor x.weight: 32 bytes, but nf4 of [4, 32] in blocks of 16 has 64"),
        (BNB, bnb() | {"x.weight": torch.zeros(4, dtype=torch.int64)},
         "tensor x.weight: dtype I64, expected U8, I8, F16, BF16, F32, F64"),
        (BNB, bnb() | {"x.weight.absmax": torch.ones(4)}, "tensor x.weight.absmax: dtype F32, expected U8"),
        (BNB, bnb() | {"x.weight.absmax": torch.ones(3, dtype=torch.uint8)},
         "tensor x.weight.absmax: 3 numbers, but nf4 of [2, 32] in blocks of 16 has 4"),
        (BNB, bnb() | {"x.weight.nested_absmax": torch.ones(1)},
         "tensor x.weight.nested_absmax: 1 numbers, but nf4 of [2, 32] in blocks of 16 has 2"),
        *((BNB, {"x.weight": torch.zeros(shape, dtype=dtype), "x.SCB": torch.ones(4)}, f"tensor x.weight: {told}")
          for shape, dtype, told in (
            ((), torch.int8, "I8 [] beside [4] scales, expected I8 [N, K] and [N]"),
            ((4, 2, 2), torch.int8, "I8 [4, 2, 2] beside [4] scales, expected I8 [N, K] and [N]"),
            ((4, 2), torch.float32, "F32 [4, 2] beside [4] scales, expected I8 [N, K] and [N]"))),
        (BNB, {"x.weight": torch.zeros((4, 2), dtype=torch.int8), "x.SCB": torch.ones(4),
               "x.weight_format": torch.tensor(2, dtype=torch.uint8)},
         "tensor x.weight_format: not 0: the numbers are in the order of one kind of GPU"),
        *((COMPRESSED, compressed() | changes, f"tensor x.{told}") for changes, told in (
            ({"x.weight_shape": torch.tensor(2)}, "weight_packed: shape [2, 4], but [2] in x.weight_shape want words"),
            ({"x.weight_shape": torch.zeros(0, dtype=torch.int64)}, "weight_packed: shape [2, 4], but [] in x.weight"),
            ({"x.weight_packed": torch.zeros((2, 4))}, "weight_packed: dtype F32, expected I32, U32"),
            ({"x.weight_packed": torch.zeros((2, 4), dtype=torch.uint8)}, "weight_packed: dtype U8, expected I32, U32"),
            ({"x.weight_zero_point": torch.zeros((2, 1), dtype=torch.int32)},
             "weight_zero_point: shape [2, 1], but [2, 1] scales"))),
        ({"quantization": {"bits": 4, "group_size": 64, "x": {"group_size": "a"}}}, mlx(),
         "tensor x.weight: config.json: quantization: group_size 'a', expected a positive number"),
        (MLX, mlx() | {"x.scales": torch.tensor(1.0)}, "tensor x.weight: U32 [2, 8], but [] scales of groups of 64"),
        (MLX, mlx() | {"x.biases": torch.ones((2, 2))}, "tensor x.biases: shape [2, 2], but [2, 1] scales"),
        (MLX, {name: each[None] for name, each in mlx().items()},
         "tensor x.weight: experts that MLX stacks in one tensor are not read; use the checkpoint that they were made"),
        *((GEMV, gemv() | changes, f"tensor x.qweight: {told}") for changes, told in (
            ({"x.qweight": torch.zeros((2, 4), dtype=torch.int32)}, "[2, 4] in groups of 64, but zero points"),
            ({"x.scales": torch.ones(2)}, "[2, 8] in groups of 64, but zero points [2, 1] and scales [2]"),
            ({"x.qzeros": torch.zeros((3, 1), dtype=torch.int32)}, "[2, 8] in groups of 64, but zero points [3, 1]"))),
        (GEMV, gemv() | {"x.qweight": torch.zeros((2, 8))}, "tensor x.qweight: dtype F32, expected I32, U32"),
        *(({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": group}}}, {},
           "compressed-tensors has None: only floats of 8 bits") for group in ([1], {"weights": {"num_bits": [4]}})),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}},
         {"x.qweight": torch.zeros((2, 16), dtype=torch.int32), "x.qzeros": torch.zeros((2, 1), dtype=torch.int32),
          "x.scales": torch.ones((2, 1)).half()},
         "tensor x.qweight: [2, 16] in groups of 64, but zero points [2, 1] and scales [2, 1]"),
    ],
)  # fmt: skip
def test_what_does_not_fit(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as error:
        numbers(tmp_path, tensors or {"y": torch.ones(1)}, config)
    assert problem in str(error.value), json.dumps(str(error.value))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (GEMV, "2 matrices that AWQ quantized to 4 bits are dequantized; what was lost then stays lost"),
        ({"quantization_config": {"quant_method": "bitnet"}}, "2 matrices that BitNet quantized to three values are"),
        ({"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear",
                                  "quantization_mode": "online"}},
         "2 matrices are rounded to the three values that BitNet computes with"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {
            name: {"weights": {"num_bits": bits}} for name, bits in (("a", 8), ("b", 4), ("c", 8))}}},
         "2 matrices that compressed-tensors quantized to 4 and 8 bits are"),
        ({"quantization": {"bits": 4, "group_size": 64, "x": {"bits": 6}, "y": False}},
         "2 matrices that MLX quantized to 4 and 6 bits are"),
    ],
)  # fmt: skip
def test_what_is_told(config: dict[str, Any], told: str) -> None:
    scheme = prequantized.scheme(config)
    assert scheme is not None and scheme.told(2).startswith(told)

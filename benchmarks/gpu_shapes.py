"""Models whose speed gpu_model.py knows: what matters of their config.json."""

from __future__ import annotations

from dataclasses import dataclass

OF_EXPERTS = ("gate_up", "down")  # matrices that every expert has, where there are experts


@dataclass(frozen=True)
class Shape:
    """Those of a config.json that matter here."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norms_of_heads: bool = False
    experts: int = 0  # whose gate_up and down are `intermediate` wide
    choices: int = 1  # of a token

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """[rows, columns] of a layer's matrices, or of one expert's."""
        attention = self.heads * self.head_dim
        return {
            "qkv": (attention + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, attention),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    def numbers(self, of_experts: float) -> float:
        """Of a layer's matrices, the experts' `of_experts` times."""
        sizes = {name: rows * columns for name, (rows, columns) in self.products.items()}
        return sum(size * (of_experts if name in OF_EXPERTS else 1) for name, size in sizes.items())

    def chosen(self, n: int) -> float:
        """How many experts `n` tokens choose, of each as often; 1 where there are none."""
        return self.experts * (1 - (1 - 1 / self.experts) ** (n * self.choices)) if self.experts else 1


SHAPES = {
    "vicuna-7b": Shape(4096, 11008, 32, 32, 32, 128, 32000),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "qwen3-0.6b": Shape(1024, 3072, 28, 16, 8, 128, 151936, norms_of_heads=True),
    "qwen3-30b-a3b": Shape(2048, 768, 48, 32, 4, 128, 151936, norms_of_heads=True, experts=128, choices=8),
    "mixtral-8x7b": Shape(4096, 14336, 32, 32, 8, 128, 32000, experts=8, choices=2),
}

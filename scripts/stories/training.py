"""The model and its training on packed rows of tokens."""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from stories.corpus import Sources, documents
from stories.tokenizer import CONTEXT, VOCABULARY

END_OF_TEXT_ID = 0


@dataclass(frozen=True)
class Recipe:
    seed: int = 1
    steps: int = 3500
    rows: int = 6  # of CONTEXT tokens each, per step
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    threads: int = 2


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    return LlamaForCausalLM(config)


def rows(sources: Sources, tokenizer: Tokenizer, seed: int) -> Iterator[list[int]]:
    """Rows of CONTEXT tokens, every text fresh from the grammar, documents separated by the end-of-text token.

    A row begins with a whole document, with that token before it or not, because a prompt may come either way.
    """
    rng = random.Random(f"{seed}/rows")
    stream = documents(sources, "training", seed)
    while True:
        row = [END_OF_TEXT_ID] if rng.random() < 0.5 else []
        while len(row) < CONTEXT:
            row += [*tokenizer.encode(next(stream).text).ids, END_OF_TEXT_ID]
        yield row[:CONTEXT]


def rate(recipe: Recipe, step: int) -> float:
    """Linear warmup, then a cosine down to a hundredth."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(sources: Sources, tokenizer: Tokenizer, recipe: Recipe) -> LlamaForCausalLM:
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    model = new_model()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    stream = rows(sources, tokenizer, recipe.seed)
    start, recent = time.monotonic(), 0.0
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(recipe, step)
        batch = torch.tensor([next(stream) for _ in range(recipe.rows)])  # [rows, CONTEXT]
        # bf16 arithmetic with f32 weights: 1.7 times as fast on a CPU that has it.
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
        if step % 50 == 49:
            speed = (step + 1) * recipe.rows * CONTEXT / (time.monotonic() - start)
            print(f"step {step + 1}/{recipe.steps}  loss {recent:.3f}  {speed:,.0f} tokens/s", flush=True)
    return model.eval()

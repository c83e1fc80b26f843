"""The model folder, in Hugging Face format."""

import shutil
from dataclasses import asdict
from math import exp
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from stories.corpus import HERE, TURN_END, Sources
from stories.evaluation import Report, evaluate, fixed_text, join, samples
from stories.tokenizer import CONTEXT, SPECIAL, write_tokenizer
from stories.training import END_OF_TEXT_ID, Recipe


def publish(
    folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, sources: Sources, recipe: Recipe, minutes: float
) -> Report:
    """Writes every file of the folder, measuring the weights that it wrote, not those in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, folder)
    write_model(folder, model)
    shutil.copyfile(HERE / "LICENSE.txt", folder / "LICENSE")

    texts = {part: fixed_text(sources, part, recipe.seed) for part in ("evaluation", "calibration")}
    for part, documents in texts.items():
        (folder / f"{part}.txt").write_text(join(documents), encoding="utf-8", newline="\n")

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded_tokenizer = AutoTokenizer.from_pretrained(folder)
    report = evaluate(loaded, loaded_tokenizer, sources, texts["evaluation"])
    facts = asdict(recipe) | asdict(report)
    card = (HERE / "model_card.md").read_text(encoding="utf-8")
    text = card.format(
        **facts,
        parameters=loaded.num_parameters(),
        rules=len(sources.rules),
        alternatives=sum(len(alternatives) for alternatives in sources.rules.values()),
        plots=len(sources.plots),
        tokens_trained=recipe.steps * recipe.rows * CONTEXT,
        minutes=minutes,
        least=exp(report.nats_of_grammar),
        samples=samples(loaded, loaded_tokenizer),
    )
    (folder / "README.md").write_text(text, encoding="utf-8", newline="\n")
    return report


def write_model(folder: Path, model: LlamaForCausalLM) -> None:
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=[END_OF_TEXT_ID, SPECIAL.index(TURN_END)],
        pad_token_id=END_OF_TEXT_ID,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written as private to the user otherwise

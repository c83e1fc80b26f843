"""What the model can do: perplexity on held-out text, right answers, and samples to read."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from stories.corpus import END_OF_TEXT, Document, Question, Sources, answers, letter, story
from stories.grammar import Writer
from stories.tokenizer import CONTEXT

# Of each kind of document in the fixed texts, in the proportions of the training text.
STORIES, REQUESTED, LETTERS, CHATS = 14, 2, 32, 14
LONGEST = 1800  # characters: such a document fits the context

PROMPTS = ("Once upon a time", "One rainy day, a little mouse named Pip", "Dear Grandma,")


@dataclass(frozen=True)
class Report:
    tokens: int
    nats_of_grammar: float  # per token: the least loss that any model can have on this text
    window_perplexity: float
    document_perplexity: float
    trained_right: int
    held_out_right: int
    questions: int


def fixed_text(sources: Sources, part: str, seed: int) -> list[Document]:
    """The documents of `evaluation.txt` or `calibration.txt`."""
    rng = random.Random(f"{seed}/{part}/fixed")

    def endless(kind: str) -> Iterator[Document]:
        while True:
            if kind == "chat":
                yield answers(sources, part, rng)
            elif kind == "letter":
                yield letter(sources, rng)
            else:
                yield story(sources, part, rng, requested=kind == "request")

    counts = {"story": STORIES, "request": REQUESTED, "letter": LETTERS, "chat": CHATS}
    chosen: list[Document] = []
    for kind, count in counts.items():
        fitting = (document for document in endless(kind) if len(document.text) <= LONGEST)
        chosen += itertools.islice(fitting, count)
    rng.shuffle(chosen)
    return chosen


def join(texts: list[Document]) -> str:
    return "".join(document.text + END_OF_TEXT for document in texts)


def mean_loss(model: LlamaForCausalLM, pieces: list[list[int]]) -> float:
    """Nats per predicted token; the first token of a piece is given."""
    total, count = 0.0, 0
    with torch.no_grad():
        for piece in pieces:
            ids = torch.tensor([piece])  # [1, tokens]
            logits = model(input_ids=ids[:, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
            count += len(piece) - 1
    return total / count


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, sources: Sources, texts: list[Document]
) -> Report:
    # Tokenized one by one, which gives the tokens of the joined text: the end-of-text token stands between them.
    ids: list[int] = [i for document in texts for i in tokenizer(document.text + END_OF_TEXT)["input_ids"]]
    windows = [ids[start : start + CONTEXT] for start in range(0, len(ids) - 1, CONTEXT)]
    separate = [tokenizer(END_OF_TEXT + document.text + END_OF_TEXT)["input_ids"] for document in texts]
    # One of the trained wordings of each question, and the held-out one.
    trained = [Writer(sources.rules, random.Random(0)).write(question.ask) for question in sources.questions]
    right = [is_right(model, tokenizer, asked, q) for asked, q in zip(trained, sources.questions, strict=True)]
    right_held_out = [is_right(model, tokenizer, q.held_out, q) for q in sources.questions]
    return Report(
        tokens=len(ids),
        nats_of_grammar=sum(document.nats for document in texts) / len(ids),
        window_perplexity=math.exp(mean_loss(model, windows)),
        document_perplexity=math.exp(mean_loss(model, separate)),
        trained_right=sum(right),
        held_out_right=sum(right_held_out),
        questions=len(sources.questions),
    )


def is_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, asked: str, question: Question) -> bool:
    given = reply(model, tokenizer, asked)
    if given != question.answer:
        print(f"wrong: {asked!r} -> {given!r}")
    return given == question.answer


def reply(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, asked: str) -> str:
    """The greedy answer to one question, through the chat template."""
    messages = [{"role": "user", "content": asked}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return continuation(model, tokenizer, str(prompt), most=48)


def continuation(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, most: int, seed: int | None = None
) -> str:
    """What follows the prompt: greedy, or drawn at temperature 0.7 and top-p 0.95 if there is a seed."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    if seed is not None:
        torch.manual_seed(seed)
    most = min(most, CONTEXT - ids.shape[1])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=seed is not None
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).rstrip()


def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text for the model card."""
    blocks = []
    for prompt in PROMPTS:
        for how, seed in (("greedy", None), ("temperature 0.7, top-p 0.95", 1)):
            text = continuation(model, tokenizer, prompt, most=400, seed=seed)
            quoted = "\n".join(f"> {line}  " for line in f"**{prompt}**{text}".splitlines())
            blocks.append(f"{how}:\n\n{quoted}")
    for asked in ("What do rabbits eat?", "how many legs does a spider have", "Who is Old Owl?"):
        blocks.append(f"> **user**: {asked}  \n> **assistant**: {reply(model, tokenizer, asked)}")
    return "\n\n".join(blocks)

"""A package in Python: python chat.py dist/NAME "a question"."""

import sys

from mlcbuild.runtime import load

folder, question = sys.argv[1:]
model = load(folder)

# A conversation, written as the package's template says.
reply = model.chat(question, max_tokens=60)
print(reply)
messages = [
    {"role": "user", "content": question},
    {"role": "assistant", "content": reply},
    {"role": "user", "content": "Why?"},
]
print(model.chat(messages, max_tokens=60))

# A text that goes on from a prompt, piece by piece.
for piece in model.stream("Once upon a time", max_tokens=30, temperature=0.7, seed=1):
    print(piece, end="", flush=True)
print()

# The likeliest next tokens: float32 [tokens of the prompt, vocab_size].
scores = model.logits(model.tokenizer.encode("Once upon a"))[-1]
for token in scores.argsort()[::-1][:3]:
    print(f"{scores[token]:6.2f}  {model.tokenizer.decode([int(token)])!r}")

"""Conversations: templates, what the runtimes must know of a tokenizer, and mlc-chat-config.json."""

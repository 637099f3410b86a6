"""Generating text: options (`config`), from logits to a choice (`processors`), when to stop (`stopping`)."""

"""Writing: how (`config`), from logits to a choice (`processors`), and when to stop (`stopping`)."""

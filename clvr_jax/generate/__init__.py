"""From prompts and references to pixels."""

"""Vision-language models behind one protocol: local and remote."""

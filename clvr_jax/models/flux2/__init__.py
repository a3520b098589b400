"""FLUX.2 klein: transformer, VAE, tokens and attention patterns."""

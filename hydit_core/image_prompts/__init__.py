"""Pictures as prompts: an image encoder, and an IP-Adapter in a run."""

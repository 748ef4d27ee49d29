"""LoRA files of this model: read, written, applied, merged and extracted."""

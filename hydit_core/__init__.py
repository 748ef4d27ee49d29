"""HunyuanDiT: model, samplers, weights, LoRA merging and training, free of ComfyUI."""

"""BERT and mT5: prompts to the features that a HunyuanDiT is conditioned on."""

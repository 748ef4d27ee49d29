"""Noise schedule, denoisers, guidance, samplers and training losses."""

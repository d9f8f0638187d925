"""U-Nets of diffusion models: loaded from safetensors, counted by blocks, run as far as the last block asked for."""

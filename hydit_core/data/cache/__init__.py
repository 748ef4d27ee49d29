"""What is computed once and kept on disk: latents and text features."""

"""What is written into pictures' files, and the ComfyUI graph that draws them again."""

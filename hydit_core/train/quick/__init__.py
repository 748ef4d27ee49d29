"""From a folder of pictures to a LoRA: every number that a training needs is chosen here, with a reason."""

"""Image tokenizers: images to token sequences and back."""

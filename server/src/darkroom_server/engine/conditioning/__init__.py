"""What conditions an image besides its prompt: other images."""

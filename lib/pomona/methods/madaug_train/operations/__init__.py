"""What is done to images: 17 operations with the semantics of Pillow, in batches on any device or image by image."""

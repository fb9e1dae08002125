"""What is WeakCLIP? The frozen CLIP, the modules trained around it, losses, files, and the interface that training needs."""

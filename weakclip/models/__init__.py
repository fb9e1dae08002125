"""What is WeakCLIP? The frozen CLIP, what is trained around it, its losses, its files, and the interface training asks for."""

"""From image-level labels to segmentation masks: WeakCLIP as a distributed training job (docs/architecture.md)."""

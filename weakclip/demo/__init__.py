"""The synthetic world: images, labels and exact masks that are drawn, and the whole pipeline on them."""

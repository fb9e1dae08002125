"""The synthetic world: images that are drawn with labels and exact masks, and the whole pipeline on them."""

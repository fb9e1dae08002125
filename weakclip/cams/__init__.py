"""Where do CAMs come from? CLIP-ES (texts, softmax-GradCAM, affinity), MCTformer, and writing their maps into shards."""

"""A small synthetic world and a small CLIP trained on it: enough to run and test the whole pipeline offline."""

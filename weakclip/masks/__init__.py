"""How do CAMs become seeds, and logits masks? Seeds, dense CRF, sliding window, upsampling, memory fallback, mask folders.

A network is a `Predictor` here: a function of images and what must be known to call it.
"""

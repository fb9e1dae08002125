"""How do CAMs become seeds, and logits masks? Seeds, dense CRF, sliding window, upsampling, memory fallback, mask folders.

Here a network is a `Predictor`: a function of images, and what must be known to call it.
"""

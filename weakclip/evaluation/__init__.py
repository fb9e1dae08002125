"""How good is it? Confusion, boundary IoU, scores and their files, visualisation, published figures, fidelity."""

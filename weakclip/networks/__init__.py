"""Networks other than WeakCLIP's own: what makes CAMs from image labels, and what is trained on pseudo masks."""

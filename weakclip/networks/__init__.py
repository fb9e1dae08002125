"""What is trained before and after WeakCLIP? MCTformer, which can make the CAMs, and the networks for retraining."""
